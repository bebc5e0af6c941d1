#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

#include "error.h"
#include "kernels.h"

namespace adatsq {
namespace {

constexpr int kMinimumVersion = 12000;                        // CUDA 12.0 brought CUlibrary
constexpr std::int32_t kSharedBytesWithoutOptIn = 48 * 1024;  // CUDA C++ programming guide, "Shared memory"

/// Fills in one function; false when the driver is too old.
template <typename Function>
bool find(decltype(&::cuGetProcAddress) getProcAddress, const char* name, Function& function) {
    void* address = nullptr;
    CUdriverProcAddressQueryResult found{};
    if (getProcAddress(name, &address, kMinimumVersion, CU_GET_PROC_ADDRESS_DEFAULT, &found) != CUDA_SUCCESS)
        return false;
    function = reinterpret_cast<Function>(address);
    return function != nullptr;
}

std::optional<Driver> loadDriver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // stays loaded, as the process uses it
    if (!library) return std::nullopt;
    const auto get = reinterpret_cast<decltype(&::cuGetProcAddress)>(dlsym(library, "cuGetProcAddress_v2"));
    Driver driver{};
    const bool complete =
        get && find(get, "cuCtxGetCurrent", driver.ctxGetCurrent) && find(get, "cuCtxGetDevice", driver.ctxGetDevice) &&
        find(get, "cuDeviceGetAttribute", driver.deviceGetAttribute) &&
        find(get, "cuFuncSetAttribute", driver.funcSetAttribute) &&
        find(get, "cuGetErrorString", driver.getErrorString) &&
        find(get, "cuKernelGetFunction", driver.kernelGetFunction) &&
        find(get, "cuLaunchKernel", driver.launchKernel) && find(get, "cuLibraryGetKernel", driver.libraryGetKernel) &&
        find(get, "cuLibraryLoadData", driver.libraryLoadData);
    if (!complete) return std::nullopt;
    return driver;
}

const Driver& requireDriver() {
    const Driver* driver = findDriver();
    if (!driver) fail("there is no CUDA driver of version 12.0 or newer (libcuda.so.1)");
    return *driver;
}

CUkernel loadKernel(const Driver& driver, const Kernel& kernel) {
    CUlibrary library{};
    driver.check(driver.libraryLoadData(&library, kernel.cubin, nullptr, nullptr, 0, nullptr, nullptr, 0),
                 kernel.symbol);
    CUkernel loaded{};
    driver.check(driver.libraryGetKernel(&loaded, library, kernel.symbol), kernel.symbol);
    return loaded;
}

/// Loaded at first use and kept for the process, as are the cubins.
CUkernel loadedKernel(const Driver& driver, const Kernel& kernel) {
    static std::mutex mutex;
    static std::map<const Kernel*, CUkernel> loaded;
    const std::lock_guard lock(mutex);
    auto place = loaded.find(&kernel);
    if (place == loaded.end()) place = loaded.emplace(&kernel, loadKernel(driver, kernel)).first;
    return place->second;
}

}  // namespace

void Driver::check(CUresult result, const char* what) const {
    if (result == CUDA_SUCCESS) return;
    const char* words = nullptr;
    getErrorString(result, &words);
    fail("the CUDA driver refuses '", what, "': ", words ? words : "unknown error", " (", static_cast<int>(result),
         ")");
}

const Driver* findDriver() {
    static const std::optional<Driver> driver = loadDriver();
    return driver ? &*driver : nullptr;
}

CUcontext currentContext() {
    const Driver* driver = findDriver();
    CUcontext context{};
    // Without cuInit, which the CUDA runtime has called where there is a context, this fails: there is none.
    if (!driver || driver->ctxGetCurrent(&context) != CUDA_SUCCESS) return nullptr;
    return context;
}

std::optional<Device> currentDevice() {
    if (!currentContext()) return std::nullopt;
    const Driver& driver = requireDriver();
    CUdevice device{};
    driver.check(driver.ctxGetDevice(&device), "current device");
    const auto attribute = [&](CUdevice_attribute which) {
        int value = 0;
        driver.check(driver.deviceGetAttribute(&value, which, device), "device attribute");
        return value;
    };
    const int major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
    const int minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
    return Device{10 * major + minor, attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)};
}

CUfunction functionOf(const Kernel& kernel) {
    const Driver& driver = requireDriver();
    CUfunction function{};
    driver.check(driver.kernelGetFunction(&function, loadedKernel(driver, kernel)), kernel.symbol);
    if (kernel.sharedBytes > kSharedBytesWithoutOptIn) {
        driver.check(
            driver.funcSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.sharedBytes),
            kernel.symbol);
    }
    return function;
}

}  // namespace adatsq
