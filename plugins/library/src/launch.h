#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "layer.h"
#include "problem.h"

namespace adatsq {

/// Bytes of workspace for x [m, k] quantized per token: q, then its scales.
std::size_t workspaceBytes(std::int64_t m, std::int64_t k);

/// GEMM kernels that can do the problem on a device, tiles ascending: the tactics. Throws Error when there is none.
std::vector<const Kernel*> gemmCandidates(const Layer& layer, const Problem& problem, const Device& device);

/// What one enqueue launches, loaded into one context.
struct LaunchPlan {
    CUcontext context;
    const Kernel* quantizer;  ///< nullptr for formats that read x as it is
    CUfunction quantizerFunction;
    const Kernel* gemm;
    CUfunction gemmFunction;
};

/// Chooses the kernels for the device of the current context and loads them there. Throws Error.
LaunchPlan makePlan(const Layer& layer, const Problem& problem, std::int32_t tactic);

/// Launches the plan on the stream; never synchronizes, so a CUDA graph can capture it. Throws Error.
///
/// Args:
///     inputs: device addresses in the order of layer.inputs().
///     y: device address of the output.
///     workspace: at least workspaceBytes(m, k) when plan.quantizer is there.
void launch(const Layer& layer, const Problem& problem, const LaunchPlan& plan, const void* const* inputs, void* y,
            void* workspace, CUstream stream);

}  // namespace adatsq
