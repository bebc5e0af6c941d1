#include "linear_plugin.h"

#include <memory>
#include <utility>

#include "driver.h"
#include "error.h"
#include "fields.h"
#include "kernels.h"
#include "log.h"

namespace adatsq {
namespace {

using namespace nvinfer1;

constexpr std::int32_t kSuccess = 0;
constexpr std::int32_t kFailure = -1;

/// The shapes that the builder times a profile with.
std::vector<PluginTensorDesc> atOptimum(const DynamicPluginTensorDesc* tensors, std::int32_t count) {
    std::vector<PluginTensorDesc> descs;
    for (std::int32_t i = 0; tensors && i < count; ++i) {
        descs.push_back(tensors[i].desc);
        descs.back().dims = tensors[i].opt;
    }
    return descs;
}

void checkCount(const Layer& layer, std::int32_t inputCount, std::int32_t outputCount) {
    const auto expected = static_cast<std::int32_t>(layer.inputs().size());
    if (inputCount != expected || outputCount != 1) {
        fail("the node has ", inputCount, " inputs and ", outputCount, " outputs; expected ", expected, " (",
             layer.inputsText(), ") and 1");
    }
}

std::string describe(const Layer& layer) {
    return "profiles=" + layer.profilesText() + " inputs=" + layer.inputsText() +
           " group_size=" + std::to_string(layer.groupSize()) + " kernels=" + kKernelsDigest;
}

}  // namespace

LinearPlugin::LinearPlugin(Layer layer) : layer_(std::move(layer)), timingCacheId_(describe(layer_)) {}

IPluginCapability* LinearPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept {
    switch (type) {
    case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* LinearPlugin::clone() noexcept {
    return guarded("clone", static_cast<IPluginV3*>(nullptr), [this]() -> IPluginV3* {
        auto copy = std::make_unique<LinearPlugin>(layer_);
        copy->tactic_ = tactic_;
        copy->problem_ = problem_;  // the plan is made anew, in the context of whoever runs the clone
        return copy.release();
    });
}

std::int32_t LinearPlugin::configurePlugin(const DynamicPluginTensorDesc* inputs, std::int32_t inputCount,
                                           const DynamicPluginTensorDesc* outputs, std::int32_t outputCount) noexcept {
    return guarded("configurePlugin", kFailure, [&] {
        checkCount(layer_, inputCount, outputCount);
        const auto in = atOptimum(inputs, inputCount);
        const auto out = atOptimum(outputs, outputCount);
        problem_ = makeProblem(layer_, in.data(), inputCount, out.data(), outputCount);
        return kSuccess;
    });
}

std::int32_t LinearPlugin::getOutputDataTypes(DataType* outputTypes, std::int32_t outputCount,
                                              const DataType* inputTypes, std::int32_t inputCount) const noexcept {
    return guarded("getOutputDataTypes", kFailure, [&] {
        checkCount(layer_, inputCount, outputCount);
        outputTypes[0] = inputTypes[layer_.position(Role::kX)];
        return kSuccess;
    });
}

std::int32_t LinearPlugin::getOutputShapes(const DimsExprs* inputs, std::int32_t inputCount, const DimsExprs*,
                                           std::int32_t, DimsExprs* outputs, std::int32_t outputCount,
                                           IExprBuilder&) noexcept {
    return guarded("getOutputShapes", kFailure, [&] {
        checkCount(layer_, inputCount, outputCount);
        const DimsExprs& x = inputs[layer_.position(Role::kX)];
        const DimsExprs& weights = inputs[layer_.position(layer_.operands(layer_.profiles().front()).weights)];
        if (x.nbDims < 1 || x.nbDims > Dims::MAX_DIMS || weights.nbDims != 2) {
            fail("x has ", x.nbDims, " and the weights have ", weights.nbDims,
                 " dimensions; expected at least 1, and 2");
        }
        outputs[0] = x;
        outputs[0].d[x.nbDims - 1] = weights.d[0];
        return kSuccess;
    });
}

bool LinearPlugin::supportsFormatCombination(std::int32_t position, const DynamicPluginTensorDesc* tensors,
                                             std::int32_t inputCount, std::int32_t outputCount) noexcept {
    return guarded("supportsFormatCombination", false, [&] {
        checkCount(layer_, inputCount, outputCount);
        if (position < 0 || position > inputCount) fail("position ", position, " of ", inputCount + 1, " tensors");
        const PluginTensorDesc& tensor = tensors[position].desc;
        if (tensor.format != TensorFormat::kLINEAR) return false;
        const std::int32_t x = layer_.position(Role::kX);
        const Role role = position == inputCount ? Role::kX : layer_.inputs()[static_cast<std::size_t>(position)];
        // Only tensors before `position` are settled. Where x comes later, it is x that has to agree.
        if (role != Role::kX && expectedType(role, DataType::kHALF) == expectedType(role, DataType::kBF16)) {
            return tensor.type == expectedType(role, DataType::kHALF);
        }
        if (!acceptsType(layer_, tensor.type)) return false;
        if (position > x) return tensor.type == tensors[x].desc.type;
        for (std::int32_t i = 0; i < position; ++i) {
            const Role before = layer_.inputs()[static_cast<std::size_t>(i)];
            if (expectedType(before, tensor.type) != tensors[i].desc.type) return false;
        }
        return true;
    });
}

std::size_t LinearPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* inputs, std::int32_t inputCount,
                                           const DynamicPluginTensorDesc*, std::int32_t outputCount) const noexcept {
    return guarded("getWorkspaceSize", std::size_t{0}, [&]() -> std::size_t {
        checkCount(layer_, inputCount, outputCount);
        if (!layer_.quantizes()) return 0;
        const Extents largest = extentsOf(inputs[layer_.position(Role::kX)].max);
        return workspaceBytes(largest.m, largest.k);
    });
}

std::int32_t LinearPlugin::countTactics() const {
    const auto device = currentDevice();
    if (!problem_ || !device) return 0;  // the default tactic alone
    const auto count = static_cast<std::int32_t>(gemmCandidates(layer_, *problem_, *device).size());
    return count > 1 ? count : 0;
}

std::int32_t LinearPlugin::getNbTactics() noexcept {
    return guarded("getNbTactics", 0, [this] { return countTactics(); });
}

std::int32_t LinearPlugin::getValidTactics(std::int32_t* tactics, std::int32_t tacticCount) noexcept {
    return guarded("getValidTactics", kFailure, [&] {
        if (tacticCount != countTactics()) fail("asked for ", tacticCount, " tactics; there are ", countTactics());
        for (std::int32_t i = 0; i < tacticCount; ++i) tactics[i] = i + 1;
        return kSuccess;
    });
}

std::int32_t LinearPlugin::setTactic(std::int32_t tactic) noexcept {
    tactic_ = tactic;
    plan_.reset();
    return kSuccess;
}

std::int32_t LinearPlugin::onShapeChange(const PluginTensorDesc* inputs, std::int32_t inputCount,
                                         const PluginTensorDesc* outputs, std::int32_t outputCount) noexcept {
    return guarded("onShapeChange", kFailure, [&] {
        plan_.reset();
        problem_.reset();
        problem_ = makeProblem(layer_, inputs, inputCount, outputs, outputCount);
        // Kernels are loaded here and not at the first launch, because a CUDA graph capture forbids loading.
        if (currentContext()) plan_ = makePlan(layer_, *problem_, tactic_);
        return kSuccess;
    });
}

std::int32_t LinearPlugin::enqueue(const PluginTensorDesc*, const PluginTensorDesc*, const void* const* inputs,
                                   void* const* outputs, void* workspace, cudaStream_t stream) noexcept {
    return guarded("enqueue", kFailure, [&] {
        if (!problem_) fail("onShapeChange has not accepted any shapes");
        if (problem_->m == 0) return kSuccess;  // an empty batch
        if (!plan_ || plan_->context != currentContext()) plan_ = makePlan(layer_, *problem_, tactic_);
        launch(layer_, *problem_, *plan_, inputs, outputs[0], workspace, stream);
        return kSuccess;
    });
}

IPluginV3* LinearPlugin::attachToContext(IPluginResourceContext*) noexcept {
    return clone();
}

const PluginFieldCollection* LinearPlugin::getFieldsToSerialize() noexcept {
    return guarded("getFieldsToSerialize", static_cast<const PluginFieldCollection*>(nullptr),
                   [this]() -> const PluginFieldCollection* {
                       serialVersion_ = kSerialVersion;
                       groupSize_ = layer_.groupSize();
                       checksum_ = checksumOf(layer_.profilesText(), layer_.inputsText(), layer_.groupSize());
                       const auto text = [](const char* name, const std::string& value) {
                           return PluginField(name, value.data(), PluginFieldType::kCHAR,
                                              static_cast<std::int32_t>(value.size()));
                       };
                       const auto number = [](const char* name, const std::int32_t& value) {
                           return PluginField(name, &value, PluginFieldType::kINT32, 1);
                       };
                       fields_ = {text(kProfilesField, layer_.profilesText()), text(kInputsField, layer_.inputsText()),
                                  number(kGroupSizeField, groupSize_), number(kSerialVersionField, serialVersion_),
                                  number(kChecksumField, checksum_)};
                       collection_ = {static_cast<std::int32_t>(fields_.size()), fields_.data()};
                       return &collection_;
                   });
}

}  // namespace adatsq
