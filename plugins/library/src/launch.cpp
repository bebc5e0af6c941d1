#include "launch.h"

#include <array>
#include <cstring>
#include <optional>

#include "driver.h"
#include "error.h"

namespace adatsq {
namespace {

constexpr std::size_t kAlignment = 256;  // of cudaMalloc, which TensorRT gives the workspace
constexpr float kLargestCode = 127.0F;   // of int8 tokens, symmetric

/// Where the scales start, behind q [m, k].
std::size_t scalesOffset(std::int64_t m, std::int64_t k) {
    return (static_cast<std::size_t>(m) * static_cast<std::size_t>(k) + kAlignment - 1) / kAlignment * kAlignment;
}

/// The values of all arguments that a kernel can ask for; cuLaunchKernel takes the address of each.
class Arguments {
  public:
    template <typename Value>
    void set(Argument argument, Value value) {
        static_assert(sizeof(Value) <= sizeof(void*));
        std::memcpy(&values_[static_cast<std::size_t>(argument)], &value, sizeof(Value));
    }
    void* address(Argument argument) { return &values_[static_cast<std::size_t>(argument)]; }

    /// Whether an address or a size is a multiple of 16.
    bool isDivisibleBy16(Argument argument) const { return values_[static_cast<std::size_t>(argument)] % 16 == 0; }

  private:
    std::array<std::uint64_t, kArguments> values_{};  // pointers are null until they are set
};

Arguments bind(const Layer& layer, const Problem& problem, const void* const* inputs, void* y, void* workspace) {
    Arguments arguments;
    const auto bindInput = [&](Argument argument, std::optional<Role> role) {
        if (role && layer.has(*role)) arguments.set(argument, inputs[layer.position(*role)]);
    };
    const Operands operands = layer.operands(problem.format);
    bindInput(Argument::kX, Role::kX);
    bindInput(Argument::kW, operands.weights);
    bindInput(Argument::kLo, operands.lowPlane);
    bindInput(Argument::kWScale, operands.weightScale);
    bindInput(Argument::kBias, Role::kBias);
    bindInput(Argument::kSmoothing, Role::kSmoothing);
    if (operands.quantizer) {
        auto* q = static_cast<unsigned char*>(workspace);
        if (!q) fail("TensorRT gave no workspace; ", workspaceBytes(problem.m, problem.k), " bytes are needed");
        arguments.set(Argument::kQ, q);
        arguments.set(Argument::kXScale, q + scalesOffset(problem.m, problem.k));
    }
    bindInput(Argument::kXScale, operands.inputScale);  // a static scale in place of the workspace's
    arguments.set(Argument::kY, y);
    arguments.set(Argument::kM, problem.m);
    arguments.set(Argument::kN, problem.n);
    arguments.set(Argument::kK, problem.k);
    arguments.set(Argument::kHasBias, static_cast<std::int32_t>(layer.has(Role::kBias)));
    arguments.set(Argument::kHasSmoothing, static_cast<std::int32_t>(layer.has(Role::kSmoothing)));
    arguments.set(Argument::kMaximum, kLargestCode);
    return arguments;
}

std::int64_t blocks(std::int64_t extent, std::int64_t tile) {
    return (extent + tile - 1) / tile;
}

void launchKernel(const Kernel& kernel, CUfunction function, std::int64_t grid, Arguments& arguments, CUstream stream) {
    if (grid > INT32_MAX) fail("'", kernel.symbol, "' would need ", grid, " blocks; a grid has at most 2^31 - 1");
    std::vector<void*> parameters;
    for (std::size_t i = 0; i < kernel.parameterCount; ++i) {
        const Parameter& parameter = kernel.parameters[i];
        if (parameter.divisibleBy16 && !arguments.isDivisibleBy16(parameter.argument)) {
            fail("launch argument ", i, " of '", kernel.symbol, "' is not a multiple of 16");
        }
        parameters.push_back(arguments.address(parameter.argument));
    }
    const Driver& driver = *findDriver();
    driver.check(
        driver.launchKernel(function, static_cast<unsigned int>(grid), 1, 1, static_cast<unsigned int>(kernel.threads),
                            1, 1, static_cast<unsigned int>(kernel.sharedBytes), stream, parameters.data(), nullptr),
        kernel.symbol);
}

Element elementOf(const Problem& problem) {
    return problem.type == nvinfer1::DataType::kHALF ? Element::kFp16 : Element::kBf16;
}

}  // namespace

std::size_t workspaceBytes(std::int64_t m, std::int64_t k) {
    return scalesOffset(m, k) + static_cast<std::size_t>(m) * sizeof(float);
}

std::vector<const Kernel*> gemmCandidates(const Layer& layer, const Problem& problem, const Device& device) {
    const Operands operands = layer.operands(problem.format);
    return candidates({operands.gemm, device, elementOf(problem), operands.grouped ? layer.groupSize() : 0,
                       std::nullopt, problem.m, problem.n, problem.k});
}

LaunchPlan makePlan(const Layer& layer, const Problem& problem, std::int32_t tactic) {
    const auto device = currentDevice();
    if (!device) fail("there is no CUDA context in this thread");
    LaunchPlan plan{currentContext(), nullptr, nullptr, nullptr, nullptr};
    plan.gemm = &choose(gemmCandidates(layer, problem, *device), problem.m, tactic);
    plan.gemmFunction = functionOf(*plan.gemm);
    if (const char* quantizer = layer.operands(problem.format).quantizer) {
        const Wanted wanted{quantizer,        *device,   elementOf(problem), 0,
                            plan.gemm->order, problem.m, problem.n,          problem.k};
        plan.quantizer = candidates(wanted).front();
        plan.quantizerFunction = functionOf(*plan.quantizer);
    }
    return plan;
}

void launch(const Layer& layer, const Problem& problem, const LaunchPlan& plan, const void* const* inputs, void* y,
            void* workspace, CUstream stream) {
    Arguments arguments = bind(layer, problem, inputs, y, workspace);
    // A quantizer has one block for each token.
    if (plan.quantizer) launchKernel(*plan.quantizer, plan.quantizerFunction, problem.m, arguments, stream);
    const std::int64_t tiles = blocks(problem.m, plan.gemm->blockM) * blocks(problem.n, plan.gemm->blockN);
    launchKernel(*plan.gemm, plan.gemmFunction, tiles, arguments, stream);
}

}  // namespace adatsq
