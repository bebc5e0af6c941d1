#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

#include "layer.h"

namespace adatsq {

/// One product: y [m, n] = x [m, k] · W [n, k]ᵀ in one format.
struct Problem {
    Format format;
    nvinfer1::DataType type;  ///< of x, bias and y: kHALF or kBF16
    std::int32_t m;           ///< product of all extents of x but the last
    std::int32_t n;
    std::int32_t k;
};

/// Tokens and inputs of a layer.
struct Extents {
    std::int64_t m;
    std::int64_t k;
};

/// The extents of x [..., k]; throws Error unless they are known and the kernels can index x.
Extents extentsOf(const nvinfer1::Dims& x);

/// Type that the input must have when x has `xType`.
nvinfer1::DataType expectedType(Role role, nvinfer1::DataType xType);

/// Whether x can have this type: 16 bits, and the one that an fp16 or bf16 profile names.
bool acceptsType(const Layer& layer, nvinfer1::DataType xType);

/// Checks types and shapes against the attributes and each other; throws Error naming the input that does not fit.
/// All extents must be known.
Problem makeProblem(const Layer& layer, const nvinfer1::PluginTensorDesc* inputs, std::int32_t inputCount,
                    const nvinfer1::PluginTensorDesc* outputs, std::int32_t outputCount);

}  // namespace adatsq
