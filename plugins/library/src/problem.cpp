#include "problem.h"

#include <limits>
#include <string>
#include <vector>

#include "error.h"

namespace adatsq {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

std::string describe(const Dims& dims) {
    std::string text = "[";
    for (std::int32_t i = 0; i < dims.nbDims; ++i) text.append(i ? ", " : "").append(std::to_string(dims.d[i]));
    return text + "]";
}

std::string describe(const std::vector<std::int64_t>& extents) {
    std::string text = "[";
    for (const std::int64_t extent : extents) text.append(text.size() > 1 ? ", " : "").append(std::to_string(extent));
    return text + "]";
}

bool matches(const Dims& dims, const std::vector<std::int64_t>& extents) {
    if (dims.nbDims != static_cast<std::int32_t>(extents.size())) return false;
    for (std::int32_t i = 0; i < dims.nbDims; ++i) {
        if (dims.d[i] != extents[static_cast<std::size_t>(i)]) return false;
    }
    return true;
}

void checkTensor(const char* name, const PluginTensorDesc& tensor) {
    if (tensor.dims.nbDims < 1 || tensor.dims.nbDims > Dims::MAX_DIMS) {
        fail("'", name, "' has ", tensor.dims.nbDims, " dimensions; expected 1 to ", Dims::MAX_DIMS);
    }
    for (std::int32_t i = 0; i < tensor.dims.nbDims; ++i) {
        if (tensor.dims.d[i] < 0) fail("'", name, "' has the shape ", describe(tensor.dims), ", which is not known");
    }
    if (tensor.format != TensorFormat::kLINEAR) {
        fail("'", name, "' has the tensor format ", static_cast<int>(tensor.format), "; expected linear");
    }
}

std::vector<std::int64_t> expectedShape(Role role, std::int64_t n, std::int64_t k, std::int64_t groupSize) {
    switch (role) {
    case Role::kBias:
    case Role::kW8Scale:
    case Role::kWFp8Scale: return {n};
    case Role::kSmoothing: return {k};
    case Role::kW16:
    case Role::kW8:
    case Role::kWFp8: return {n, k};
    case Role::kW4:
    case Role::kLo: return {n, k / 2};
    case Role::kW4Scale: return {n, k / groupSize};
    case Role::kXFp8Scale: return {1};
    case Role::kX:
    case Role::kSelector: break;
    }
    return {};
}

/// Kernels index elements with 32 bits.
void checkSize(const char* name, std::int64_t rows, std::int64_t columns) {
    constexpr std::int64_t limit = std::numeric_limits<std::int32_t>::max();
    if (rows > limit || columns > limit || (columns > 0 && rows > limit / columns)) {
        fail("'", name, "' has ", rows, " × ", columns, " elements; the kernels hold fewer than 2^31");
    }
}

void checkOutput(const PluginTensorDesc& y, const PluginTensorDesc& x, std::int64_t n) {
    checkTensor("y", y);
    if (y.type != x.type) fail("y has the type ", static_cast<int>(y.type), "; expected that of x");
    Dims expected = x.dims;
    expected.d[expected.nbDims - 1] = n;
    const std::vector<std::int64_t> extents(expected.d, expected.d + expected.nbDims);
    if (!matches(y.dims, extents)) fail("y has the shape ", describe(y.dims), "; expected ", describe(expected));
}

void checkTypes(const Layer& layer, const PluginTensorDesc* inputs, DataType xType) {
    if (!acceptsType(layer, xType)) {
        fail("x has the type ", static_cast<int>(xType), "; expected fp16 or bf16, and no other than a profile names");
    }
    for (std::size_t i = 0; i < layer.inputs().size(); ++i) {
        const Role role = layer.inputs()[i];
        if (inputs[i].type != expectedType(role, xType)) {
            fail("'", nameOf(role), "' has the type ", static_cast<int>(inputs[i].type), "; expected ",
                 static_cast<int>(expectedType(role, xType)), " (numbers of nvinfer1::DataType)");
        }
    }
}

}  // namespace

DataType expectedType(Role role, DataType xType) {
    switch (role) {
    case Role::kX:
    case Role::kBias:
    case Role::kW16: return xType;
    case Role::kSelector: return DataType::kINT32;
    case Role::kW8:
    case Role::kW4:
    case Role::kLo: return DataType::kINT8;
    case Role::kWFp8: return DataType::kFP8;
    case Role::kSmoothing:
    case Role::kW8Scale:
    case Role::kW4Scale:
    case Role::kWFp8Scale:
    case Role::kXFp8Scale: break;
    }
    return DataType::kFLOAT;
}

bool acceptsType(const Layer& layer, DataType xType) {
    if (xType != DataType::kHALF && xType != DataType::kBF16) return false;
    for (const Format format : layer.profiles()) {
        if (format == Format::kFp16 && xType != DataType::kHALF) return false;
        if (format == Format::kBf16 && xType != DataType::kBF16) return false;
    }
    return true;
}

Extents extentsOf(const Dims& x) {
    if (x.nbDims < 1 || x.nbDims > Dims::MAX_DIMS) fail("x has ", x.nbDims, " dimensions");
    std::int64_t m = 1;
    for (std::int32_t i = 0; i < x.nbDims; ++i) {
        if (x.d[i] < 0) fail("x has the shape ", describe(x), ", which is not known");
        if (i + 1 < x.nbDims && __builtin_mul_overflow(m, x.d[i], &m))
            fail("x has the shape ", describe(x), ": too large");
    }
    const std::int64_t k = x.d[x.nbDims - 1];
    checkSize("x", m, k);
    return {m, k};
}

Problem makeProblem(const Layer& layer, const PluginTensorDesc* inputs, std::int32_t inputCount,
                    const PluginTensorDesc* outputs, std::int32_t outputCount) {
    if (!inputs || !outputs || inputCount != static_cast<std::int32_t>(layer.inputs().size()) || outputCount != 1) {
        fail("the node has ", inputCount, " inputs and ", outputCount, " outputs; expected ", layer.inputs().size(),
             " (", layer.inputsText(), ") and 1");
    }
    for (std::size_t i = 0; i < layer.inputs().size(); ++i) checkTensor(nameOf(layer.inputs()[i]), inputs[i]);

    const PluginTensorDesc& x = inputs[layer.position(Role::kX)];
    checkTypes(layer, inputs, x.type);
    const Dims& selector = inputs[layer.position(Role::kSelector)].dims;
    const Format format = layer.select(selector.d[selector.nbDims - 1]);

    const Dims& weights = inputs[layer.position(layer.operands(format).weights)].dims;
    const auto [m, k] = extentsOf(x.dims);
    const std::int64_t n = weights.d[0];
    checkSize("y", m, n);
    checkSize("weights", n, k);
    if (n < 1 || k < 1) fail("the layer has ", k, " inputs and ", n, " outputs; expected at least one of each");
    if (layer.has(Role::kW4) && k % layer.groupSize() != 0) {
        fail("K = ", k, " is not a multiple of group_size = ", layer.groupSize());
    }
    for (std::size_t i = 0; i < layer.inputs().size(); ++i) {
        const Role role = layer.inputs()[i];
        if (role == Role::kX || role == Role::kSelector) continue;
        const auto expected = expectedShape(role, n, k, layer.groupSize());
        if (!matches(inputs[i].dims, expected)) {
            fail("'", nameOf(role), "' has the shape ", describe(inputs[i].dims), "; expected ", describe(expected),
                 " for K = ", k, " and N = ", n);
        }
    }
    checkOutput(outputs[0], x, n);
    return {format, x.type, static_cast<std::int32_t>(m), static_cast<std::int32_t>(n), static_cast<std::int32_t>(k)};
}

}  // namespace adatsq
