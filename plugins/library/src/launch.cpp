#include "launch.h"

#include <array>

#include "driver.h"
#include "error.h"

namespace adatsq {
namespace {

constexpr std::size_t kAlignment = 256;  // of cudaMalloc, which TensorRT gives the workspace

/// Where the scales start, behind q [m, k].
std::size_t scalesOffset(std::int64_t m, std::int64_t k) {
    return (static_cast<std::size_t>(m) * static_cast<std::size_t>(k) + kAlignment - 1) / kAlignment * kAlignment;
}

/// The values of all arguments that a kernel can ask for.
struct Arguments {
    std::array<const void*, kPointerArguments> pointers{};
    std::array<std::int32_t, 3> sizes{};

    const void*& pointer(Argument argument) { return pointers[static_cast<std::size_t>(argument)]; }

    /// Address of the value, as cuLaunchKernel wants it.
    void* address(Argument argument) {
        const auto place = static_cast<std::size_t>(argument);
        if (place < kPointerArguments) return &pointers[place];
        return &sizes[place - kPointerArguments];
    }
};

Arguments bind(const Layer& layer, const Problem& problem, const void* const* inputs, void* y, void* workspace) {
    Arguments arguments;
    arguments.sizes = {problem.m, problem.n, problem.k};
    const auto input = [&](Role role) { return inputs[layer.position(role)]; };
    const Operands operands = layer.operands(problem.format);
    arguments.pointer(Argument::kX) = input(Role::kX);
    arguments.pointer(Argument::kY) = y;
    arguments.pointer(Argument::kW) = input(operands.weights);
    if (operands.lowPlane) arguments.pointer(Argument::kLo) = input(*operands.lowPlane);
    if (operands.weightScale) arguments.pointer(Argument::kWScale) = input(*operands.weightScale);
    if (operands.inputScale) arguments.pointer(Argument::kXScale) = input(*operands.inputScale);
    if (layer.has(Role::kBias)) arguments.pointer(Argument::kBias) = input(Role::kBias);
    if (operands.quantizesTokens) {
        auto* q = static_cast<unsigned char*>(workspace);
        if (!q) fail("TensorRT gave no workspace; ", workspaceBytes(problem.m, problem.k), " bytes are needed");
        arguments.pointer(Argument::kQ) = q;
        arguments.pointer(Argument::kXScale) = q + scalesOffset(problem.m, problem.k);
        if (layer.has(Role::kSmoothing)) arguments.pointer(Argument::kSmoothing) = input(Role::kSmoothing);
    }
    return arguments;
}

unsigned int blocks(std::int32_t extent, std::int32_t tile) {
    return static_cast<unsigned int>((static_cast<std::int64_t>(extent) + tile - 1) / tile);
}

void launchKernel(const Kernel& kernel, CUfunction function, unsigned int grid, Arguments& arguments, CUstream stream) {
    std::vector<void*> parameters;
    for (std::size_t i = 0; i < kernel.parameterCount; ++i) {
        const Parameter& parameter = kernel.parameters[i];
        const auto place = static_cast<std::size_t>(parameter.argument);
        if (parameter.divisibleBy16 && place < kPointerArguments &&
            reinterpret_cast<std::uintptr_t>(arguments.pointers[place]) % 16 != 0) {
            fail("argument ", place, " of '", kernel.symbol, "' is not aligned to 16 bytes");
        }
        parameters.push_back(arguments.address(parameter.argument));
    }
    const Driver& driver = *findDriver();
    driver.check(driver.launchKernel(function, grid, 1, 1, static_cast<unsigned int>(kernel.threads), 1, 1,
                                     static_cast<unsigned int>(kernel.sharedBytes), stream, parameters.data(), nullptr),
                 kernel.symbol);
}

Element elementOf(const Problem& problem) {
    return problem.type == nvinfer1::DataType::kHALF ? Element::kFp16 : Element::kBf16;
}

}  // namespace

std::size_t workspaceBytes(std::int64_t m, std::int64_t k) {
    return scalesOffset(m, k) + static_cast<std::size_t>(m) * sizeof(float);
}

std::vector<const Kernel*> gemmCandidates(const Layer& layer, const Problem& problem, std::int32_t capability) {
    const Operands operands = layer.operands(problem.format);
    return candidates({operands.kernel, capability, elementOf(problem), operands.grouped ? layer.groupSize() : 0,
                       layer.has(Role::kBias), false, problem.m, problem.n, problem.k});
}

LaunchPlan makePlan(const Layer& layer, const Problem& problem, std::int32_t tactic) {
    const auto capability = currentCapability();
    if (!capability) fail("there is no CUDA context in this thread");
    LaunchPlan plan{currentContext(), nullptr, nullptr, nullptr, nullptr};
    plan.gemm = &choose(gemmCandidates(layer, problem, *capability), problem.m, tactic);
    plan.gemmFunction = functionOf(*plan.gemm);
    if (layer.operands(problem.format).quantizesTokens) {
        plan.quantize = candidates({"quantize_tokens", *capability, elementOf(problem), 0, false,
                                    layer.has(Role::kSmoothing), problem.m, problem.n, problem.k})
                            .front();
        plan.quantizeFunction = functionOf(*plan.quantize);
    }
    return plan;
}

void launch(const Layer& layer, const Problem& problem, const LaunchPlan& plan, const void* const* inputs, void* y,
            void* workspace, CUstream stream) {
    Arguments arguments = bind(layer, problem, inputs, y, workspace);
    if (plan.quantize) {
        launchKernel(*plan.quantize, plan.quantizeFunction, blocks(problem.m, plan.quantize->blockM), arguments,
                     stream);
    }
    const std::int64_t tiles = static_cast<std::int64_t>(blocks(problem.m, plan.gemm->blockM)) *
                               static_cast<std::int64_t>(blocks(problem.n, plan.gemm->blockN));
    if (tiles > INT32_MAX) fail("'", plan.gemm->symbol, "' would need ", tiles, " blocks; a grid has at most 2^31 - 1");
    launchKernel(*plan.gemm, plan.gemmFunction, static_cast<unsigned int>(tiles), arguments, stream);
}

}  // namespace adatsq
