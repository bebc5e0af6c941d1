// Drives libadatsq_plugins.so as TensorRT does, through the registry of a real TensorRT runtime.
//
//   harness RUNTIME LIBRARY load|dlopen [MUTATIONS]
//
// RUNTIME: libnvinfer_lean.so.11 or another runtime of the headers' major version. LIBRARY: the plugin library, loaded
// by the registry (load) or only by dlopen, when it has to register itself. With the recording driver in
// LD_LIBRARY_PATH it goes as far as the launches; without, up to onShapeChange.

#include "harness.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <utility>

using namespace nvinfer1;

namespace {

int failures = 0;
std::mutex loggedMutex;
std::string logged;

class Logger final : public ILogger {
    void log(Severity, const char* message) noexcept override {
        const std::lock_guard lock(loggedMutex);
        logged.append(message).append("\n");
    }
} logger;

class Finder final : public ILoggerFinder {
    ILogger* findLogger() override { return &logger; }
} finder;

template <typename Function>
Function symbol(void* library, const char* name) {
    return reinterpret_cast<Function>(dlsym(library, name));
}

void* open(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        std::fprintf(stderr, "%s\n", dlerror());
        std::exit(2);
    }
    return library;
}

IPluginCreatorV3One* creatorOf(IPluginRegistry& registry) {
    return static_cast<IPluginCreatorV3One*>(registry.getCreator("AdatsqLinear", "1", "adatsq"));
}

/// Loads the library in the given way; afterwards loadLibrary has to work in either case.
IPluginCreatorV3One* load(IPluginRegistry& registry, const char* path, const std::string& way) {
    expect(!creatorOf(registry), "the registry does not know the plugin yet");
    void* library = nullptr;
    if (way == "dlopen") {
        library = open(path);
        expect(creatorOf(registry), "dlopen: the library has registered itself");
    }
    void* handle = registry.loadLibrary(path);
    expect(handle, "loadLibrary" + std::string(library ? " after dlopen" : ""));
    registry.deregisterLibrary(handle);
    expect(!creatorOf(registry), "deregisterLibrary");
    expect(registry.loadLibrary(path), "loadLibrary once more");
    symbol<void (*)(ILoggerFinder*)>(library ? library : open(path), "setLoggerFinder")(&finder);
    return creatorOf(registry);
}

}  // namespace

bool expect(bool holds, const std::string& what) {
    std::printf("%s %s\n", holds ? "ok  " : "FAIL", what.c_str());
    failures += !holds;
    return holds;
}

std::string takeLogged() {
    const std::lock_guard lock(loggedMutex);
    return std::exchange(logged, {});
}

int main(int argc, char** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: harness RUNTIME LIBRARY load|dlopen [MUTATIONS]\n");
        return 2;
    }
    void* tensorrt = open(argv[1]);
    const int version = symbol<int (*)()>(tensorrt, "getInferLibVersion")();
    std::printf("TensorRT %d, headers %d\n", version, static_cast<int>(NV_TENSORRT_VERSION));
    if (version / 10000 != NV_TENSORRT_MAJOR) {
        std::fprintf(stderr, "the runtime and the headers are of different major versions\n");
        return 2;
    }
    auto& registry = *symbol<IPluginRegistry* (*)()>(tensorrt, "getPluginRegistry")();

    Session session;
    session.creator = load(registry, argv[2], argv[3]);
    if (!expect(session.creator, "getCreator AdatsqLinear 1 adatsq")) return 1;
    if (void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL)) {
        session.setCapability = symbol<SetCapability>(driver, "setCapability");
        session.takeLaunches = symbol<TakeLaunches>(driver, "takeLaunches");
        session.countLoads = symbol<CountLoads>(driver, "countLoads");
    }
    std::printf("driver: %s\n", session.setCapability ? "recording" : "none; no launches");

    runCalls(session);
    runBadInput(session);
    runMutations(session, argc > 4 ? std::atoi(argv[4]) : 10000);
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}
