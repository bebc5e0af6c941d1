#include "layer.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "error.h"

namespace adatsq {
namespace {

constexpr const char* kTokens = "quantize_tokens";
constexpr std::size_t kMaxNames = 1024;  // far above any policy; keeps damaged attributes from taking memory

constexpr std::array<std::string_view, 7> kFormatNames{"w8a8", "w4a8", "w8a16", "int4wo", "fp8", "fp16", "bf16"};
constexpr std::array<std::string_view, 13> kRoleNames{"x",     "selector",    "bias",       "smoothing", "w16",
                                                      "w8",    "w8_scale",    "w4",         "w4_scale",  "lo",
                                                      "w_fp8", "w_fp8_scale", "x_fp8_scale"};

template <std::size_t Count>
std::string listOf(const std::array<std::string_view, Count>& names) {
    std::string list;
    for (const auto name : names) list.append(list.empty() ? "" : ", ").append(name);
    return list;
}

/// Comma-separated names → their places among `known`.
template <typename Enum, std::size_t Count>
std::vector<Enum> parse(const char* attribute, std::string_view text,
                        const std::array<std::string_view, Count>& known) {
    std::vector<Enum> parsed;
    while (true) {
        const auto comma = text.find(',');
        const auto name = text.substr(0, comma);
        const auto place = std::find(known.begin(), known.end(), name);
        if (place == known.end()) {
            fail("attribute '", attribute, "' has the unknown name '", name.substr(0, 64), "'; known are ",
                 listOf(known));
        }
        parsed.push_back(static_cast<Enum>(place - known.begin()));
        if (parsed.size() > kMaxNames) fail("attribute '", attribute, "' has more than ", kMaxNames, " names");
        if (comma == std::string_view::npos) return parsed;
        text.remove_prefix(comma + 1);
    }
}

std::vector<Role> readsOf(const Operands& operands) {
    std::vector<Role> roles{operands.weights};
    for (const auto& role : {operands.lowPlane, operands.weightScale, operands.inputScale}) {
        if (role) roles.push_back(*role);
    }
    return roles;
}

}  // namespace

const char* nameOf(Format format) {
    return kFormatNames[static_cast<std::size_t>(format)].data();
}
const char* nameOf(Role role) {
    return kRoleNames[static_cast<std::size_t>(role)].data();
}

Layer::Layer(std::string profiles, std::string inputs, std::int32_t groupSize)
    : profilesText_(std::move(profiles)),
      inputsText_(std::move(inputs)),
      groupSize_(groupSize),
      profiles_(parse<Format>("profiles", profilesText_, kFormatNames)),
      inputs_(parse<Role>("inputs", inputsText_, kRoleNames)) {
    if (groupSize_ != 64 && groupSize_ != 128) fail("attribute 'group_size' is ", groupSize_, "; expected 64 or 128");
    for (const Role role : inputs_) {
        if (std::count(inputs_.begin(), inputs_.end(), role) > 1) {
            fail("attribute 'inputs' has '", nameOf(role), "' more than once");
        }
    }
    for (const Role role : {Role::kX, Role::kSelector}) {
        if (!has(role)) fail("attribute 'inputs' lacks '", nameOf(role), "'");
    }
    for (const Format format : profiles_) checkFormat(format);
    checkSuperfluous();
}

Operands Layer::operands(Format format) const {
    const bool nested = has(Role::kLo);
    switch (format) {
    case Format::kW8A8:
        if (nested) return {kTokens, "gemm_w8a8_nested", Role::kW4, Role::kLo, Role::kW8Scale, {}, false};
        return {kTokens, "gemm_w8a8", Role::kW8, {}, Role::kW8Scale, {}, false};
    case Format::kW4A8: return {kTokens, "gemm_w4a8", Role::kW4, {}, Role::kW4Scale, {}, true};
    case Format::kW8A16:
        if (nested) return {nullptr, "gemm_w8a16_nested", Role::kW4, Role::kLo, Role::kW8Scale, {}, false};
        return {nullptr, "gemm_w8a16", Role::kW8, {}, Role::kW8Scale, {}, false};
    case Format::kInt4WeightOnly: return {nullptr, "gemm_w4a16", Role::kW4, {}, Role::kW4Scale, {}, true};
    case Format::kFp8: return {"quantize_fp8", "gemm_fp8", Role::kWFp8, {}, Role::kWFp8Scale, Role::kXFp8Scale, false};
    case Format::kFp16:
    case Format::kBf16: return {nullptr, "gemm_16", Role::kW16, {}, {}, {}, false};
    }
    fail("format number ", static_cast<int>(format), " is unknown");
}

bool Layer::quantizes() const {
    return std::any_of(profiles_.begin(), profiles_.end(), [&](Format f) { return operands(f).quantizer != nullptr; });
}

Format Layer::select(std::int64_t extent) const {
    if (extent < 1 || extent > static_cast<std::int64_t>(profiles_.size())) {
        fail("the selector's last extent is ", extent, ", which selects no profile; the node has ", profiles_.size(),
             " (", profilesText_, "), so pin the extent between 1 and ", profiles_.size(),
             " in the optimization profile");
    }
    return profiles_[static_cast<std::size_t>(extent - 1)];
}

std::int32_t Layer::find(Role role) const {
    const auto place = std::find(inputs_.begin(), inputs_.end(), role);
    return place == inputs_.end() ? -1 : static_cast<std::int32_t>(place - inputs_.begin());
}

void Layer::checkFormat(Format format) const {
    const Operands reads = operands(format);
    for (const Role role : readsOf(reads)) {
        if (!has(role)) fail("profile '", nameOf(format), "' reads '", nameOf(role), "', which 'inputs' lacks");
    }
    // The planes of a smoothed layer hold W · smoothing, so a kernel that reads x as it is would be wrong.
    if (has(Role::kSmoothing) && (format == Format::kW8A16 || format == Format::kInt4WeightOnly)) {
        fail("profile '", nameOf(format), "' cannot have 'smoothing': it reads x unquantized");
    }
}

void Layer::checkSuperfluous() const {
    std::vector<Role> used{Role::kX, Role::kSelector, Role::kBias};
    for (const Format format : profiles_) {
        if (operands(format).quantizer == kTokens) used.push_back(Role::kSmoothing);
        for (const Role role : readsOf(operands(format))) used.push_back(role);
    }
    for (const Role role : inputs_) {
        if (std::find(used.begin(), used.end(), role) == used.end()) {
            fail("input '", nameOf(role), "' is read by none of the profiles ", profilesText_, "; leave it out");
        }
    }
}

}  // namespace adatsq
