#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace adatsq {

/// Values that a kernel can ask for at its launch. plugins/embed.py maps the names in kernels.json to them.
enum class Argument : std::uint8_t {
    kX,          ///< x [M, K], 16-bit
    kQ,          ///< x quantized, one byte [M, K]
    kXScale,     ///< fp32 [M], one per token; for fp8 [1], static
    kSmoothing,  ///< fp32 [K], or null
    kW,          ///< weights; of a nested layer the high plane
    kLo,         ///< low plane of a nested layer
    kWScale,     ///< fp32 [N] or [N, K/group]
    kBias,       ///< 16-bit [N], or null
    kY,          ///< y [M, N], 16-bit
    kScratch,    ///< null: what the Triton language's compiler appends and no shipped kernel uses
    kM,          ///< int32, as are the following
    kN,
    kK,
    kHasBias,
    kHasSmoothing,
    kMaximum,  ///< float: the largest code of a quantized token, 127
};
constexpr std::size_t kPointerArguments = static_cast<std::size_t>(Argument::kM);
constexpr std::size_t kArguments = static_cast<std::size_t>(Argument::kMaximum) + 1;

struct Parameter {
    Argument argument;
    bool divisibleBy16;  ///< the kernel was compiled for multiples of 16 (pointers: 16-byte alignment)
};

enum class Element : std::uint8_t { kFp16, kBf16 };

/// Order of K in quantized activations: as it is, or all even places before all odd ones. A byte of packed weights
/// holds an even and an odd place, so with kEvenOdd no kernel has to interleave.
enum class Order : std::uint8_t { kNatural, kEvenOdd };

/// One embedded cubin and how to launch it: a row of kernels.json.
struct Kernel {
    const char* family;       ///< "gemm_w4a8"
    std::int32_t capability;  ///< 80 for sm80
    Element element;          ///< of x and y
    std::int32_t group;       ///< weights that share a scale; 0: none
    Order order;              ///< of what a GEMM reads or a quantizer writes
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

/// Where it is launched.
struct Device {
    std::int32_t capability;   ///< 89 for 8.9
    std::int32_t sharedBytes;  ///< that a block can have: devices of one family differ
};

/// What a launch asks of a kernel.
struct Wanted {
    const char* family;
    Device device;
    Element element;
    std::int32_t group;
    std::optional<Order> order;  ///< none: any
    std::int32_t m, n, k;
};

/// Kernels that can do it, tiles ascending. Exact architecture, else the nearest older one of the same family.
/// Throws Error that says what is embedded when there is none.
std::vector<const Kernel*> candidates(const Wanted& wanted);

/// Tactic 0: the kernel with the smallest tile that holds m rows, else with the largest. Tactic t: candidate t - 1.
/// A tactic from an engine that was built with other kernels falls back to 0.
const Kernel& choose(const std::vector<const Kernel*>& candidates, std::int32_t m, std::int32_t tactic);

}  // namespace adatsq
