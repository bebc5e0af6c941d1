#include "kernels.h"

#include <algorithm>
#include <set>
#include <string>
#include <string_view>

#include "error.h"

namespace adatsq {
namespace {

/// A cubin runs on its own architecture and on later ones of the same major version; from sm90 on the Triton language
/// compiles architecture-specific code (sm_90a, sm_120a), which runs nowhere else.
bool runsOn(std::int32_t capability, std::int32_t device) {
    return capability == device || (capability < 90 && capability / 10 == device / 10 && capability < device);
}

/// Newest architecture of the family that runs on the device.
std::optional<std::int32_t> newest(std::string_view family, std::int32_t device) {
    std::optional<std::int32_t> best;
    for (std::size_t i = 0; i < kKernelCount; ++i) {
        const Kernel& kernel = kKernels[i];
        if (kernel.family == family && runsOn(kernel.capability, device)) {
            best = std::max(best.value_or(0), kernel.capability);
        }
    }
    return best;
}

[[noreturn]] void failWithoutArchitecture(const Wanted& wanted) {
    std::set<std::int32_t> known;
    for (std::size_t i = 0; i < kKernelCount; ++i) {
        if (kKernels[i].family == std::string_view(wanted.family)) known.insert(kKernels[i].capability);
    }
    std::string list;
    for (const std::int32_t capability : known)
        list.append(list.empty() ? "sm" : ", sm").append(std::to_string(capability));
    const std::int32_t capability = wanted.device.capability;
    fail("no cubin of '", wanted.family, "' runs on compute capability ", capability / 10, ".", capability % 10,
         "; embedded are ", list.empty() ? "none" : list, "; build the library with --targets sm", capability);
}

/// Sizes can be unsuitable for a specialised kernel; alignment of pointers is checked at the launch.
bool holdsSizes(const Kernel& kernel, const Wanted& wanted) {
    for (std::size_t i = 0; i < kernel.parameterCount; ++i) {
        const Parameter& parameter = kernel.parameters[i];
        if (!parameter.divisibleBy16) continue;
        if (parameter.argument == Argument::kM && wanted.m % 16 != 0) return false;
        if (parameter.argument == Argument::kN && wanted.n % 16 != 0) return false;
        if (parameter.argument == Argument::kK && wanted.k % 16 != 0) return false;
    }
    return true;
}

bool isVariant(const Kernel& kernel, const Wanted& wanted, std::int32_t capability) {
    return kernel.family == std::string_view(wanted.family) && kernel.capability == capability &&
           kernel.element == wanted.element && kernel.group == wanted.group &&
           (!wanted.order || kernel.order == *wanted.order) && kernel.sharedBytes <= wanted.device.sharedBytes;
}

}  // namespace

std::vector<const Kernel*> candidates(const Wanted& wanted) {
    const auto capability = newest(wanted.family, wanted.device.capability);
    if (!capability) failWithoutArchitecture(wanted);
    std::vector<const Kernel*> found;
    for (std::size_t i = 0; i < kKernelCount; ++i) {
        if (isVariant(kKernels[i], wanted, *capability) && holdsSizes(kKernels[i], wanted))
            found.push_back(&kKernels[i]);
    }
    if (found.empty()) {
        fail("no embedded kernel of '", wanted.family, "' for sm", *capability, " has group ", wanted.group, " and ",
             wanted.element == Element::kFp16 ? "fp16" : "bf16", " and takes M = ", wanted.m, ", N = ", wanted.n,
             ", K = ", wanted.k, " with ", wanted.device.sharedBytes,
             " bytes of shared memory; most take only N and K that are multiples of 16");
    }
    return found;
}

const Kernel& choose(const std::vector<const Kernel*>& candidates, std::int32_t m, std::int32_t tactic) {
    if (tactic > 0 && static_cast<std::size_t>(tactic) <= candidates.size()) {
        return *candidates[static_cast<std::size_t>(tactic - 1)];
    }
    const auto holds =
        std::find_if(candidates.begin(), candidates.end(), [m](const Kernel* k) { return k->blockM >= m; });
    return holds == candidates.end() ? *candidates.back() : **holds;
}

}  // namespace adatsq
