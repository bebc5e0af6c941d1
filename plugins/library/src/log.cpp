#include "log.h"

#include <atomic>
#include <cstdio>
#include <string>

#include "tensorrt_library.h"

namespace adatsq {
namespace {

std::atomic<nvinfer1::ILoggerFinder*> loggerFinder{nullptr};

nvinfer1::ILogger* findLogger() {
    if (auto* finder = loggerFinder.load()) {
        if (auto* logger = finder->findLogger()) return logger;
    }
    using GetLogger = nvinfer1::ILogger* (*)();
    const auto getLogger = reinterpret_cast<GetLogger>(findTensorRtSymbol("getLogger"));
    return getLogger ? getLogger() : nullptr;
}

}  // namespace

void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    loggerFinder = finder;
}

void log(Severity severity, const char* where, const char* sentence) noexcept {
    try {
        const std::string message = std::string("adatsq::AdatsqLinear ") + where + ": " + sentence;
        if (auto* logger = findLogger()) {
            logger->log(severity, message.c_str());
        } else if (severity <= Severity::kWARNING) {
            std::fprintf(stderr, "%s\n", message.c_str());
        }
    } catch (...) {
        std::fprintf(stderr, "adatsq::AdatsqLinear %s: %s\n", where, sentence);
    }
}

}  // namespace adatsq
