#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "recording_driver.h"

/// Prints "ok WHAT" or "FAIL WHAT" and counts failures, which main() turns into the exit status.
bool expect(bool holds, const std::string& what);

/// Sentences that the library has logged since the last call, one line each.
std::string takeLogged();

/// What TensorRT has: the creator out of the registry, and the driver if the recording one is there.
struct Session {
    nvinfer1::IPluginCreatorV3One* creator = nullptr;
    SetCapability setCapability = nullptr;  ///< null: no recording driver
    TakeLaunches takeLaunches = nullptr;
    CountLoads countLoads = nullptr;
};

/// Fields with memory of their own, each of exactly its size, so that AddressSanitizer sees a read beyond the end.
struct Fields {
    struct Field {
        std::string name;
        nvinfer1::PluginFieldType type{};
        std::int32_t length = 0;
        std::vector<std::uint8_t> data;
        bool noData = false;
    };
    std::vector<Field> fields;

    static Fields ofNode(const std::string& profiles, const std::string& inputs, std::int32_t groupSize);
    static Fields copyOf(const nvinfer1::PluginFieldCollection& collection);
    std::unique_ptr<nvinfer1::IPluginV3> create(const Session& session, nvinfer1::TensorRTPhase phase) const;
};

/// A linear layer as a node: its attributes, its sizes, and the descriptions of its tensors.
struct Node {
    std::string profiles;
    std::string inputs;
    std::int32_t groupSize = 64;
    std::int64_t n = 192;
    std::int64_t k = 128;
    nvinfer1::DataType type = nvinfer1::DataType::kHALF;

    std::vector<std::string> names() const;             ///< of the inputs
    std::int32_t place(const std::string& name) const;  ///< of an input
    std::int64_t profileCount() const;
    /// Inputs, then y. x has the shape [2, tokens / 2, k], the selector [1, extent].
    std::vector<nvinfer1::PluginTensorDesc> tensors(std::int64_t tokens, std::int64_t extent) const;
    Fields fields() const { return Fields::ofNode(profiles, inputs, groupSize); }
};

/// The layers that all parts of the harness run: nested, two copies, weight-only, weight-only nested, 16 bits, fp8.
const std::vector<Node>& nodes();

nvinfer1::IPluginV3OneBuild& build(nvinfer1::IPluginV3& plugin);
nvinfer1::IPluginV3OneRuntime& runtime(nvinfer1::IPluginV3& plugin);
std::int32_t changeShape(nvinfer1::IPluginV3& plugin, const std::vector<nvinfer1::PluginTensorDesc>& tensors);
std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic(const std::vector<nvinfer1::PluginTensorDesc>& tensors);

void runCalls(const Session& session);
void runBadInput(const Session& session);
void runMutations(const Session& session, int count);
