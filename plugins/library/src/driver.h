#pragma once

#include <cuda.h>

#include <cstdint>
#include <optional>

namespace adatsq {

struct Device;
struct Kernel;

/// The functions of the CUDA driver that the library calls, found in libcuda.so.1 at run time. CUDA 12 or newer.
///
/// Not the CUDA runtime: a process may hold several copies of that, and this library would bring one more.
struct Driver {
    decltype(&::cuCtxGetCurrent) ctxGetCurrent;
    decltype(&::cuCtxGetDevice) ctxGetDevice;
    decltype(&::cuDeviceGetAttribute) deviceGetAttribute;
    decltype(&::cuFuncSetAttribute) funcSetAttribute;
    decltype(&::cuGetErrorString) getErrorString;
    decltype(&::cuKernelGetFunction) kernelGetFunction;
    decltype(&::cuLaunchKernel) launchKernel;
    decltype(&::cuLibraryGetKernel) libraryGetKernel;
    decltype(&::cuLibraryLoadData) libraryLoadData;

    /// Throws Error naming `what` and the driver's own words unless `result` is success.
    void check(CUresult result, const char* what) const;
};

/// The driver, or nullptr on a machine without one. Thread-safe; looked for once.
const Driver* findDriver();

/// The context that is current in this thread, if any.
CUcontext currentContext();

/// The current context's device; none without a driver or a context. Throws Error.
std::optional<Device> currentDevice();

/// The kernel as a function of the current context, loaded there. Thread-safe. Throws Error.
///
/// The cubin is loaded once per process as a CUlibrary, which the driver loads into each context and keeps valid when
/// contexts come and go; a CUmodule would belong to one context.
CUfunction functionOf(const Kernel& kernel);

}  // namespace adatsq
