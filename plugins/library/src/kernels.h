#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace adatsq {

/// Launch arguments that a kernel can ask for, by their names in kernels.json. The order is that of plugins/embed.py.
enum class Argument : std::uint8_t {
    kX,               ///< x [M, K], 16-bit
    kQ,               ///< q int8 [M, K], x quantized per token
    kXScale,          ///< x_scale fp32 [M], per token; for fp8 [1], static
    kSmoothing,       ///< smoothing fp32 [K]
    kW,               ///< w, the weights; of a nested layer the high plane
    kLo,              ///< lo, the low plane of a nested layer
    kWScale,          ///< w_scale fp32 [N] or [N, K/group]
    kBias,            ///< bias [N], 16-bit
    kY,               ///< y [M, N], 16-bit
    kGlobalScratch,   ///< global_scratch: null, as no shipped kernel uses it
    kProfileScratch,  ///< profile_scratch: null, likewise
    kM,
    kN,
    kK,
};
constexpr std::size_t kPointerArguments = static_cast<std::size_t>(Argument::kM);

struct Parameter {
    Argument argument;
    bool divisibleBy16;  ///< the kernel was compiled for multiples of 16 (pointers: 16-byte alignment)
};

enum class Element : std::uint8_t { kFp16, kBf16 };

/// One embedded cubin and how to launch it: a row of kernels.json.
struct Kernel {
    const char* family;       ///< "gemm_w4a8"
    std::int32_t capability;  ///< 80 for sm80
    Element element;          ///< of x and y
    std::int32_t group;       ///< weights that share a scale; 0: none
    bool hasBias;
    bool hasSmoothing;
    std::int32_t blockM;
    std::int32_t blockN;
    std::int32_t threads;      ///< of a block
    std::int32_t sharedBytes;  ///< dynamic shared memory of a block
    const char* symbol;
    const Parameter* parameters;
    std::size_t parameterCount;
    const unsigned char* cubin;
};

/// What is embedded; written by plugins/embed.py, sorted by tile within what differs otherwise.
extern const Kernel kKernels[];
extern const std::size_t kKernelCount;
extern const char* const kKernelsDigest;  ///< sha256 of kernels.json

/// What a launch asks of a kernel.
struct Wanted {
    const char* family;
    std::int32_t capability;
    Element element;
    std::int32_t group;
    bool hasBias;
    bool hasSmoothing;
    std::int32_t m, n, k;
};

/// Kernels that can do it, tiles ascending. Exact architecture, else the nearest older one of the same family.
/// Throws Error that says what is embedded when there is none.
std::vector<const Kernel*> candidates(const Wanted& wanted);

/// Tactic 0: the kernel with the smallest tile that holds m rows, else with the largest. Tactic t: candidate t - 1.
/// A tactic from an engine that was built with other kernels falls back to 0.
const Kernel& choose(const std::vector<const Kernel*>& candidates, std::int32_t m, std::int32_t tactic);

}  // namespace adatsq
