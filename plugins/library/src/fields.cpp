#include "fields.h"

#include <cstring>
#include <optional>
#include <string>
#include <string_view>

#include "error.h"

namespace adatsq {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

constexpr std::int32_t kMaxFields = 16;
constexpr std::int32_t kMaxText = 1 << 20;
constexpr std::int32_t kDefaultGroupSize = 64;

struct Values {
    std::optional<std::string> profiles;
    std::optional<std::string> inputs;
    std::optional<std::int32_t> groupSize;
    std::optional<std::int32_t> serialVersion;
    std::optional<std::int32_t> checksum;
};

void checkField(const PluginField& field, PluginFieldType type, std::int32_t minimum, std::int32_t maximum) {
    if (field.type != type) {
        fail("field '", field.name, "' has the type ", static_cast<int>(field.type), "; expected ",
             static_cast<int>(type), " (numbers of nvinfer1::PluginFieldType)");
    }
    if (field.length < minimum || field.length > maximum) {
        fail("field '", field.name, "' has ", field.length, " values; expected ", minimum,
             maximum > minimum ? " or more" : "");
    }
    if (!field.data) fail("field '", field.name, "' has no data");
}

void assign(const PluginField& field, std::optional<std::string>& value) {
    checkField(field, PluginFieldType::kCHAR, 1, kMaxText);
    if (value) fail("field '", field.name, "' appears twice");
    value.emplace(static_cast<const char*>(field.data), static_cast<std::size_t>(field.length));
    if (value->back() == '\0') value->pop_back();  // of callers that count the terminator
}

void assign(const PluginField& field, std::optional<std::int32_t>& value) {
    checkField(field, PluginFieldType::kINT32, 1, 1);
    if (value) fail("field '", field.name, "' appears twice");
    std::memcpy(&value.emplace(), field.data, sizeof(std::int32_t));  // the data may be unaligned
}

Values readValues(const PluginFieldCollection* collection) {
    if (!collection || collection->nbFields < 0 || collection->nbFields > kMaxFields ||
        (collection->nbFields > 0 && !collection->fields)) {
        fail("there is no list of at most ", kMaxFields, " fields");
    }
    Values values;
    for (std::int32_t i = 0; i < collection->nbFields; ++i) {
        const PluginField& field = collection->fields[i];
        if (!field.name) fail("field ", i, " has no name");
        const std::string_view name = field.name;
        if (name == kProfilesField) {
            assign(field, values.profiles);
        } else if (name == kInputsField) {
            assign(field, values.inputs);
        } else if (name == kGroupSizeField) {
            assign(field, values.groupSize);
        } else if (name == kSerialVersionField) {
            assign(field, values.serialVersion);
        } else if (name == kChecksumField) {
            assign(field, values.checksum);
        } else {
            fail("unknown field '", name.substr(0, 64), "'; known are profiles, inputs and group_size");
        }
    }
    return values;
}

/// FNV-1a, 32 bits (Fowler, Noll, Vo): finds damage, not forgery.
std::int32_t hash(std::string_view bytes) {
    std::uint32_t state = 2166136261U;
    for (const char byte : bytes) state = (state ^ static_cast<unsigned char>(byte)) * 16777619U;
    return static_cast<std::int32_t>(state);
}

}  // namespace

std::int32_t checksumOf(const std::string& profiles, const std::string& inputs, std::int32_t groupSize) {
    return hash(profiles + ";" + inputs + ";" + std::to_string(groupSize));
}

Layer readFields(const PluginFieldCollection* collection, TensorRTPhase phase) {
    const Values values = readValues(collection);
    if (phase == TensorRTPhase::kRUNTIME && values.serialVersion != kSerialVersion) {
        fail("the serialized plugin has the version ", values.serialVersion.value_or(0), "; this library reads ",
             kSerialVersion, "; build the engine again with this library");
    }
    if (!values.profiles || !values.inputs) fail("the fields 'profiles' and 'inputs' are required");
    const std::int32_t groupSize = values.groupSize.value_or(kDefaultGroupSize);
    if (phase == TensorRTPhase::kRUNTIME &&
        values.checksum != checksumOf(*values.profiles, *values.inputs, groupSize)) {
        fail("the serialized plugin is damaged: its checksum does not fit; build the engine again");
    }
    return Layer(*values.profiles, *values.inputs, groupSize);
}

}  // namespace adatsq
