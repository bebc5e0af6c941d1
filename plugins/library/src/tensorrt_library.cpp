#include "tensorrt_library.h"

#include <NvInferVersion.h>
#include <dlfcn.h>
#include <link.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace adatsq {
namespace {

constexpr std::array<std::string_view, 3> kRuntimes{"libnvinfer.so", "libnvinfer_lean.so", "libnvinfer_dispatch.so"};

bool isRuntime(std::string_view path) {
    const std::string_view name = path.substr(path.rfind('/') + 1);
    for (const std::string_view runtime : kRuntimes) {
        if (name.substr(0, runtime.size()) == runtime) return true;
    }
    return false;
}

int keepRuntimePath(dl_phdr_info* info, std::size_t, void* path) {
    if (!isRuntime(info->dlpi_name)) return 0;
    *static_cast<std::string*>(path) = info->dlpi_name;
    return 1;  // ends the iteration
}

/// A symbol of the first runtime that is loaded.
void* find(const char* symbol) noexcept {
    try {
        std::string path;
        // The search is finished before dlopen is called: both hold the loader's lock.
        if (dl_iterate_phdr(keepRuntimePath, &path) == 0) return nullptr;
        void* library = dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
        if (!library) return nullptr;
        void* address = dlsym(library, symbol);
        dlclose(library);  // gives back the reference that RTLD_NOLOAD took
        return address;
    } catch (...) {
        return nullptr;
    }
}

}  // namespace

int findTensorRtMajor() noexcept {
    using Version = std::int32_t (*)();
    const auto version = reinterpret_cast<Version>(find("getInferLibVersion"));
    return version ? version() / 10000 : 0;
}

void* findTensorRtSymbol(const char* symbol) noexcept {
    return findTensorRtMajor() == NV_TENSORRT_MAJOR ? find(symbol) : nullptr;
}

}  // namespace adatsq
