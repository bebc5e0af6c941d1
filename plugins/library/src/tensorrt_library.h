#pragma once

namespace adatsq {

/// Address of a C symbol of the TensorRT runtime (full, lean or dispatch) that this process has loaded; nullptr when
/// there is none, or when its major version is not that of the headers this library was built with.
///
/// The library links no TensorRT, so that it loads beside any build of it. It searches among the loaded libraries
/// instead of naming one, because the file's name carries a version and Python loads it out of the global scope.
void* findTensorRtSymbol(const char* symbol) noexcept;

/// Major version of the TensorRT runtime that is loaded; 0 when there is none.
int findTensorRtMajor() noexcept;

}  // namespace adatsq
