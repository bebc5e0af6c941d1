#pragma once

#include <NvInferRuntime.h>

#include <exception>

namespace adatsq {

using Severity = nvinfer1::ILogger::Severity;

/// Where messages go from now on: the finder that TensorRT hands over when it loads the library.
void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept;

/// Logs one sentence: through the finder's logger, else through that of the loaded TensorRT, else on stderr.
void log(Severity severity, const char* where, const char* sentence) noexcept;

/// Runs `body` and returns its result. An exception becomes a logged error and the result `failure`, because TensorRT
/// calls noexcept functions and an exception that left one of them would end the process.
template <typename Result, typename Body>
Result guarded(const char* where, Result failure, Body&& body) noexcept {
    try {
        return body();
    } catch (const std::exception& error) {
        log(Severity::kERROR, where, error.what());
    } catch (...) {
        log(Severity::kERROR, where, "unknown exception");
    }
    return failure;
}

}  // namespace adatsq
