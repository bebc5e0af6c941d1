#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>

#include "layer.h"

namespace adatsq {

constexpr const char* kProfilesField = "profiles";
constexpr const char* kInputsField = "inputs";
constexpr const char* kGroupSizeField = "group_size";

// Only in serialized plugins.
constexpr const char* kSerialVersionField = "serial_version";
constexpr const char* kChecksumField = "checksum";
constexpr std::int32_t kSerialVersion = 1;

/// Checksum over all attributes, so that a truncated list of profiles is not taken for a shorter one.
std::int32_t checksumOf(const std::string& profiles, const std::string& inputs, std::int32_t groupSize);

/// Attributes of a node (phase kBUILD) or of a serialized plugin (kRUNTIME) → layer.
///
/// Throws Error for a missing, repeated or unknown field, a wrong type or count, other attributes than were serialized,
/// and what Layer refuses.
Layer readFields(const nvinfer1::PluginFieldCollection* collection, nvinfer1::TensorRTPhase phase);

}  // namespace adatsq
