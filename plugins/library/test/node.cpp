#include <algorithm>
#include <cstring>
#include <map>
#include <sstream>

#include "harness.h"

using namespace nvinfer1;

namespace {

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

Dims dims(const std::vector<std::int64_t>& extents) {
    Dims result{};
    result.nbDims = static_cast<std::int32_t>(extents.size());
    std::copy(extents.begin(), extents.end(), result.d);
    return result;
}

Fields::Field field(const std::string& name, PluginFieldType type, std::int32_t length, const void* data,
                    std::size_t bytes) {
    const auto* first = static_cast<const std::uint8_t*>(data);
    return {name, type, length, {first, first + bytes}};
}

}  // namespace

Fields Fields::ofNode(const std::string& profiles, const std::string& inputs, std::int32_t groupSize) {
    const auto text = [](const char* name, const std::string& value) {
        return field(name, PluginFieldType::kCHAR, static_cast<std::int32_t>(value.size()), value.data(), value.size());
    };
    return {{text("profiles", profiles), text("inputs", inputs),
             field("group_size", PluginFieldType::kINT32, 1, &groupSize, sizeof groupSize)}};
}

Fields Fields::copyOf(const PluginFieldCollection& collection) {
    Fields copy;
    for (std::int32_t i = 0; i < collection.nbFields; ++i) {
        const PluginField& f = collection.fields[i];
        const std::size_t element = f.type == PluginFieldType::kINT32 ? 4 : 1;
        copy.fields.push_back(field(f.name, f.type, f.length, f.data, element * static_cast<std::size_t>(f.length)));
    }
    return copy;
}

std::unique_ptr<IPluginV3> Fields::create(const Session& session, TensorRTPhase phase) const {
    std::vector<PluginField> list;
    for (const Field& f : fields)
        list.emplace_back(f.name.c_str(), f.noData ? nullptr : f.data.data(), f.type, f.length);
    const PluginFieldCollection collection{static_cast<std::int32_t>(list.size()), list.data()};
    return std::unique_ptr<IPluginV3>(session.creator->createPlugin("layer", &collection, phase));
}

std::vector<std::string> Node::names() const {
    return split(inputs);
}

std::int32_t Node::place(const std::string& name) const {
    const auto all = names();
    return static_cast<std::int32_t>(std::find(all.begin(), all.end(), name) - all.begin());
}

std::int64_t Node::profileCount() const {
    return static_cast<std::int64_t>(split(profiles).size());
}

std::vector<PluginTensorDesc> Node::tensors(std::int64_t tokens, std::int64_t extent) const {
    const std::map<std::string, std::pair<Dims, DataType>> known{
        {"x", {dims({2, tokens / 2, k}), type}},
        {"selector", {dims({1, extent}), DataType::kINT32}},
        {"bias", {dims({n}), type}},
        {"smoothing", {dims({k}), DataType::kFLOAT}},
        {"w16", {dims({n, k}), type}},
        {"w8", {dims({n, k}), DataType::kINT8}},
        {"w8_scale", {dims({n}), DataType::kFLOAT}},
        {"w4", {dims({n, k / 2}), DataType::kINT8}},
        {"w4_scale", {dims({n, k / groupSize}), DataType::kFLOAT}},
        {"lo", {dims({n, k / 2}), DataType::kINT8}},
        {"w_fp8", {dims({n, k}), DataType::kFP8}},
        {"w_fp8_scale", {dims({n}), DataType::kFLOAT}},
        {"x_fp8_scale", {dims({1}), DataType::kFLOAT}},
    };
    std::vector<PluginTensorDesc> tensors;
    for (const std::string& name : names()) {
        tensors.push_back({known.at(name).first, known.at(name).second, TensorFormat::kLINEAR, -1.0F});
    }
    tensors.push_back({dims({2, tokens / 2, n}), type, TensorFormat::kLINEAR, -1.0F});
    return tensors;
}

const std::vector<Node>& nodes() {
    static const std::vector<Node> all{
        {"w8a8,w4a8,w4a8", "x,selector,bias,smoothing,w4,w4_scale,lo,w8_scale"},
        {"w8a8,w4a8", "x,selector,w8,w8_scale,w4,w4_scale", 128, 192, 256, DataType::kBF16},
        {"w8a16,int4wo", "x,selector,w8,w8_scale,w4,w4_scale,bias"},
        {"w8a16,w4a8,w8a8,int4wo", "x,selector,bias,w4,w4_scale,lo,w8_scale"},
        {"fp16,w8a8", "selector,bias,x,w16,w8,w8_scale"},
        {"bf16,fp8", "x,selector,bias,w16,w_fp8,w_fp8_scale,x_fp8_scale", 64, 192, 128, DataType::kBF16},
    };
    return all;
}

IPluginV3OneBuild& build(IPluginV3& plugin) {
    return *static_cast<IPluginV3OneBuild*>(plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime& runtime(IPluginV3& plugin) {
    return *static_cast<IPluginV3OneRuntime*>(plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

std::int32_t changeShape(IPluginV3& plugin, const std::vector<PluginTensorDesc>& tensors) {
    const auto inputs = static_cast<std::int32_t>(tensors.size()) - 1;
    return runtime(plugin).onShapeChange(tensors.data(), inputs, &tensors.back(), 1);
}

std::vector<DynamicPluginTensorDesc> dynamic(const std::vector<PluginTensorDesc>& tensors) {
    std::vector<DynamicPluginTensorDesc> result;
    for (const PluginTensorDesc& tensor : tensors) result.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
    return result;
}
