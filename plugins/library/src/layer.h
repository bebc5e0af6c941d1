#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace adatsq {

/// Number format of a profile; the names are those of adatsq_trt/formats.py.
enum class Format { kW8A8, kW4A8, kW8A16, kInt4WeightOnly, kFp8, kFp16, kBf16 };

/// What an input of the node is. Weights are [N, K] (packed planes [N, K/2]), y = x Wᵀ + bias.
enum class Role {
    kX,          ///< x: fp16 or bf16 [..., K]
    kSelector,   ///< selector: int32 [batch, k]; its extent k selects the profile, its values are never read
    kBias,       ///< bias: the type of x, [N]
    kSmoothing,  ///< smoothing: fp32 [K]; x is divided by it where it is quantized per token
    kW16,        ///< w16: the type of x, [N, K]
    kW8,         ///< w8: int8 [N, K]
    kW8Scale,    ///< w8_scale: fp32 [N]; of w8, or of the nested 16·w4 + lo
    kW4,         ///< w4: int4 packed in int8, [N, K/2]; where the layer is nested, its high plane
    kW4Scale,    ///< w4_scale: fp32 [N, K/group_size]
    kLo,         ///< lo: int4 packed in int8, [N, K/2]; the low plane of a nested layer
    kWFp8,       ///< w_fp8: e4m3 [N, K]
    kWFp8Scale,  ///< w_fp8_scale: fp32 [N]
    kXFp8Scale,  ///< x_fp8_scale: fp32 [1]; static scale of x
};

const char* nameOf(Format format);
const char* nameOf(Role role);

/// What a format reads and runs.
struct Operands {
    const char* quantizer;         ///< family of kernels that first quantize x; nullptr: x is read as it is
    const char* gemm;              ///< family of kernels
    Role weights;                  ///< or high plane
    std::optional<Role> lowPlane;  ///< of a nested layer
    std::optional<Role> weightScale;
    std::optional<Role> inputScale;  ///< static; quantize_tokens computes its scales
    bool grouped;                    ///< weight scales are per group
};

/// The attributes of one node, checked against each other. Immutable.
class Layer {
  public:
    /// Args:
    ///     profiles: comma-separated formats; a selector of extent k selects the k-th.
    ///     inputs: comma-separated names of the node's inputs, in their order.
    ///     groupSize: inputs that share a scale of w4.
    /// Throws Error for unknown, repeated, missing and superfluous names and for other group sizes than 64 and 128.
    Layer(std::string profiles, std::string inputs, std::int32_t groupSize);

    const std::string& profilesText() const { return profilesText_; }
    const std::string& inputsText() const { return inputsText_; }
    std::int32_t groupSize() const { return groupSize_; }
    const std::vector<Format>& profiles() const { return profiles_; }
    const std::vector<Role>& inputs() const { return inputs_; }

    bool has(Role role) const { return find(role) >= 0; }

    /// Position of an input that the constructor has seen to be there.
    std::int32_t position(Role role) const { return find(role); }

    /// What `format` reads in this layer: the nested planes where there is a `lo`.
    Operands operands(Format format) const;

    /// Whether any profile quantizes x and so needs workspace.
    bool quantizes() const;

    /// The format that a selector of the given extent selects; throws Error when there is none.
    Format select(std::int64_t extent) const;

  private:
    std::int32_t find(Role role) const;
    void checkFormat(Format format) const;
    void checkSuperfluous() const;

    std::string profilesText_;
    std::string inputsText_;
    std::int32_t groupSize_;
    std::vector<Format> profiles_;
    std::vector<Role> inputs_;
};

}  // namespace adatsq
