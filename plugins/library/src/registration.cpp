// How TensorRT finds the plugin: through the two C functions that IPluginRegistry::loadLibrary calls, or, where the
// library is only dlopened (polygraphy, Triton server), by registering itself when it is loaded.

#include <NvInferRuntime.h>

#include <array>
#include <memory>

#include "error.h"
#include "fields.h"
#include "linear_plugin.h"
#include "log.h"
#include "tensorrt_library.h"

namespace adatsq {
namespace {

using namespace nvinfer1;

class LinearPluginCreator final : public IPluginCreatorV3One {
  public:
    IPluginV3* createPlugin(const char* name, const PluginFieldCollection* fields,
                            TensorRTPhase phase) noexcept override {
        return guarded("createPlugin", static_cast<IPluginV3*>(nullptr), [&]() -> IPluginV3* {
            try {
                return std::make_unique<LinearPlugin>(readFields(fields, phase)).release();
            } catch (const Error& error) {
                fail("node '", name ? name : "", "': ", error.what());
            }
        });
    }

    const PluginFieldCollection* getFieldNames() noexcept override {
        static const std::array<PluginField, 3> fields{
            PluginField(kProfilesField, nullptr, PluginFieldType::kCHAR, 1),
            PluginField(kInputsField, nullptr, PluginFieldType::kCHAR, 1),
            PluginField(kGroupSizeField, nullptr, PluginFieldType::kINT32, 1),
        };
        static const PluginFieldCollection collection{static_cast<std::int32_t>(fields.size()), fields.data()};
        return &collection;
    }

    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }
};

LinearPluginCreator creator;

IPluginRegistry* findRegistry() {
    using GetRegistry = IPluginRegistry* (*)();
    const auto getRegistry = reinterpret_cast<GetRegistry>(findTensorRtSymbol("getPluginRegistry"));
    return getRegistry ? getRegistry() : nullptr;
}

bool registerCreator() {
    const int major = findTensorRtMajor();
    // The registry's layout differs between major versions, so another one's cannot be called.
    if (major != 0 && major != NV_TENSORRT_MAJOR) {
        fail("TensorRT ", major, " is loaded, but this library was built with headers of ", NV_TENSORRT_MAJOR,
             "; build it with those of ", major);
    }
    auto* registry = findRegistry();
    return registry && registry->registerCreator(creator, kPluginNamespace);
}

/// Whether the creator is registered because the library was loaded while a TensorRT was there.
bool selfRegistered = guarded("registration", false, registerCreator);

}  // namespace
}  // namespace adatsq

#define ADATSQ_EXPORT extern "C" __attribute__((visibility("default")))

ADATSQ_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    adatsq::setLoggerFinder(finder);
}

ADATSQ_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[]{&adatsq::creator};
    // loadLibrary refuses creators that are registered already, so it gets the place of the self-registered one.
    if (adatsq::selfRegistered) {
        if (auto* registry = adatsq::findRegistry()) registry->deregisterCreator(adatsq::creator);
        adatsq::selfRegistered = false;
    }
    count = 1;
    return creators;
}
