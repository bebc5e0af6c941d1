// A libcuda.so.1 that executes nothing: it records what would be launched. It reads the stand-in cubins that
// tests/plugins/stand_in_kernels.py writes, "stand-in SYMBOL NAME:TYPE ...", and so knows every launch's arguments.

#include "recording_driver.h"

#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#undef cuGetProcAddress  // cuda.h lets the name stand for the versioned symbol

namespace {

struct Function {
    std::string symbol;
    std::vector<std::pair<std::string, std::string>> parameters;  // name, type
    int sharedBytes = 48 * 1024;
};

std::atomic<int> currentCapability{0};
std::atomic<int> loads{0};
std::mutex mutex;
std::string launches;

CUresult ctxGetCurrent(CUcontext* context) {
    *context = reinterpret_cast<CUcontext>(static_cast<std::uintptr_t>(currentCapability));
    return CUDA_SUCCESS;
}

CUresult ctxGetDevice(CUdevice* device) {
    *device = 0;
    return currentCapability ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

CUresult deviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = currentCapability / 10; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = currentCapability % 10; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
        *value = (currentCapability == 89 ? 99 : 163) * 1024;
        return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult getErrorString(CUresult, const char** words) {
    *words = "refused by the recording driver";
    return CUDA_SUCCESS;
}

CUresult libraryLoadData(CUlibrary* library, const void* code, CUjit_option*, void**, unsigned int, CUlibraryOption*,
                         void**, unsigned int) {
    std::istringstream words(static_cast<const char*>(code));
    auto function = std::make_unique<Function>();
    std::string word;
    if (!(words >> word) || word != "stand-in") return CUDA_ERROR_INVALID_IMAGE;
    words >> function->symbol;
    while (words >> word)
        function->parameters.emplace_back(word.substr(0, word.find(':')), word.substr(word.find(':') + 1));
    ++loads;
    static std::vector<std::unique_ptr<Function>> loaded;  // for the process, as the library keeps its kernels
    const std::lock_guard lock(mutex);
    loaded.push_back(std::move(function));
    *library = reinterpret_cast<CUlibrary>(loaded.back().get());
    return CUDA_SUCCESS;
}

CUresult libraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    if (reinterpret_cast<Function*>(library)->symbol != name) return CUDA_ERROR_NOT_FOUND;
    *kernel = reinterpret_cast<CUkernel>(library);
    return CUDA_SUCCESS;
}

CUresult kernelGetFunction(CUfunction* function, CUkernel kernel) {
    *function = reinterpret_cast<CUfunction>(kernel);
    return CUDA_SUCCESS;
}

CUresult funcSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    const std::lock_guard lock(mutex);
    reinterpret_cast<Function*>(function)->sharedBytes = value;
    return CUDA_SUCCESS;
}

std::string valueOf(const std::string& type, const void* address) {
    std::ostringstream text;
    std::uintptr_t pointer = 0;
    std::int32_t number = 0;
    float real = 0;
    if (type == "pointer") {
        std::memcpy(&pointer, address, sizeof pointer);
        text << "0x" << std::hex << pointer;
    } else if (type == "int32") {
        std::memcpy(&number, address, sizeof number);
        text << number;
    } else {
        std::memcpy(&real, address, sizeof real);
        text << real;
    }
    return text.str();
}

CUresult launchKernel(CUfunction handle, unsigned int gridX, unsigned int gridY, unsigned int gridZ,
                      unsigned int blockX, unsigned int blockY, unsigned int blockZ, unsigned int sharedBytes,
                      CUstream stream, void** arguments, void**) {
    const std::lock_guard lock(mutex);
    const Function& function = *reinterpret_cast<Function*>(handle);
    if (gridY * gridZ * blockY * blockZ != 1 || gridX == 0) return CUDA_ERROR_INVALID_VALUE;
    if (static_cast<int>(sharedBytes) > function.sharedBytes) return CUDA_ERROR_INVALID_VALUE;
    std::ostringstream line;
    line << function.symbol << " grid=" << gridX << " threads=" << blockX << " shared=" << sharedBytes << " stream=0x"
         << std::hex << reinterpret_cast<std::uintptr_t>(stream);
    for (std::size_t i = 0; i < function.parameters.size(); ++i) {
        line << ' ' << function.parameters[i].first << '=' << valueOf(function.parameters[i].second, arguments[i]);
    }
    launches += line.str() + '\n';
    return CUDA_SUCCESS;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void setCapability(int capability) {
    currentCapability = capability;
}

EXPORT int countLoads() {
    return loads;
}

EXPORT const char* takeLaunches() {
    static std::string taken;
    const std::lock_guard lock(mutex);
    taken.swap(launches);
    launches.clear();
    return taken.c_str();
}

EXPORT CUresult cuGetProcAddress_v2(const char* symbol, void** address, int version, cuuint64_t,
                                    CUdriverProcAddressQueryResult*) {
    static const std::map<std::string, void*> functions{
        {"cuCtxGetCurrent", reinterpret_cast<void*>(ctxGetCurrent)},
        {"cuCtxGetDevice", reinterpret_cast<void*>(ctxGetDevice)},
        {"cuDeviceGetAttribute", reinterpret_cast<void*>(deviceGetAttribute)},
        {"cuFuncSetAttribute", reinterpret_cast<void*>(funcSetAttribute)},
        {"cuGetErrorString", reinterpret_cast<void*>(getErrorString)},
        {"cuKernelGetFunction", reinterpret_cast<void*>(kernelGetFunction)},
        {"cuLaunchKernel", reinterpret_cast<void*>(launchKernel)},
        {"cuLibraryGetKernel", reinterpret_cast<void*>(libraryGetKernel)},
        {"cuLibraryLoadData", reinterpret_cast<void*>(libraryLoadData)},
    };
    const auto found = functions.find(symbol);
    if (version < 12000 || found == functions.end()) return CUDA_ERROR_NOT_FOUND;
    *address = found->second;
    return CUDA_SUCCESS;
}
