#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"
#include "layer.h"
#include "problem.h"

namespace adatsq {

constexpr const char* kPluginName = "AdatsqLinear";
constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "adatsq";

/// y = x Wᵀ + bias, in the number format that the extent of the selector input selects.
///
/// No override throws: each logs what is wrong and returns a failure.
class LinearPlugin final : public nvinfer1::IPluginV3,
                           public nvinfer1::IPluginV3OneCore,
                           public nvinfer1::IPluginV3OneBuild,
                           public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit LinearPlugin(Layer layer);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // Core
    const char* getPluginName() const noexcept override { return kPluginName; }
    const char* getPluginVersion() const noexcept override { return kPluginVersion; }
    const char* getPluginNamespace() const noexcept override { return kPluginNamespace; }

    // Build
    std::int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t inputCount,
                                 const nvinfer1::DynamicPluginTensorDesc* outputs,
                                 std::int32_t outputCount) noexcept override;
    std::int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, std::int32_t outputCount,
                                    const nvinfer1::DataType* inputTypes,
                                    std::int32_t inputCount) const noexcept override;
    std::int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, std::int32_t inputCount,
                                 const nvinfer1::DimsExprs* shapeInputs, std::int32_t shapeInputCount,
                                 nvinfer1::DimsExprs* outputs, std::int32_t outputCount,
                                 nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(std::int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors,
                                   std::int32_t inputCount, std::int32_t outputCount) noexcept override;
    std::int32_t getNbOutputs() const noexcept override { return 1; }
    std::size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, std::int32_t inputCount,
                                 const nvinfer1::DynamicPluginTensorDesc* outputs,
                                 std::int32_t outputCount) const noexcept override;
    std::int32_t getNbTactics() noexcept override;
    std::int32_t getValidTactics(std::int32_t* tactics, std::int32_t tacticCount) noexcept override;
    const char* getTimingCacheID() noexcept override { return timingCacheId_.c_str(); }
    const char* getMetadataString() noexcept override { return timingCacheId_.c_str(); }

    // Runtime
    std::int32_t setTactic(std::int32_t tactic) noexcept override;
    std::int32_t onShapeChange(const nvinfer1::PluginTensorDesc* inputs, std::int32_t inputCount,
                               const nvinfer1::PluginTensorDesc* outputs, std::int32_t outputCount) noexcept override;
    std::int32_t enqueue(const nvinfer1::PluginTensorDesc* inputDescs, const nvinfer1::PluginTensorDesc* outputDescs,
                         const void* const* inputs, void* const* outputs, void* workspace,
                         cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

  private:
    std::int32_t countTactics() const;

    Layer layer_;
    std::string timingCacheId_;
    std::int32_t tactic_ = 0;
    std::optional<Problem> problem_;  ///< of the current shapes
    std::optional<LaunchPlan> plan_;  ///< for problem_ and tactic_, in one CUDA context

    // What getFieldsToSerialize points to.
    std::int32_t serialVersion_ = 0;
    std::int32_t groupSize_ = 0;
    std::int32_t checksum_ = 0;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace adatsq
