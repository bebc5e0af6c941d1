// One call of the plugin on a GPU, for tests/plugins/test_library_gpu.py: everything up to enqueue behind a C function.

#include <dlfcn.h>

#include "harness.h"

using namespace nvinfer1;

/// Creates the plugin, sets the shapes and enqueues; 0 for success.
///
/// Args:
///     library: path of libadatsq_plugins.so.
///     isBf16: type of x: 1 bf16, 0 fp16.
///     extent: of the selector.
///     tokens: M, even.
///     inputs: device addresses, in the order of the attribute `inputs`; y and workspace likewise.
extern "C" __attribute__((visibility("default"))) int runLinear(const char* library, const char* profiles,
                                                                const char* inputNames, std::int32_t groupSize,
                                                                std::int32_t isBf16, std::int64_t extent,
                                                                std::int64_t tokens, std::int64_t n, std::int64_t k,
                                                                const void* const* inputs, void* y, void* workspace,
                                                                void* stream) {
    void* handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (!handle) return 1;
    using GetCreators = IPluginCreatorInterface* const* (*)(std::int32_t&);
    std::int32_t count = 0;
    Session session;
    session.creator =
        static_cast<IPluginCreatorV3One*>(reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"))(count)[0]);
    const Node node{profiles, inputNames, groupSize, n, k, isBf16 ? DataType::kBF16 : DataType::kHALF};
    const auto plugin = node.fields().create(session, TensorRTPhase::kBUILD);
    if (!plugin) return 2;
    const auto tensors = node.tensors(tokens, extent);
    if (changeShape(*plugin, tensors) != 0) return 3;
    return runtime(*plugin).enqueue(tensors.data(), &tensors.back(), inputs, &y, workspace,
                                    static_cast<cudaStream_t>(stream));
}
