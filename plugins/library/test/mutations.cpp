// Random damage to serialized fields and to tensor descriptions. The sanitizers watch; here it is checked that damage
// is refused with a sentence and that nothing but the original is accepted.

#include <random>

#include "harness.h"

using namespace nvinfer1;

namespace {

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t end) {
    return std::uniform_int_distribution<std::size_t>(0, end - 1)(random);
}

std::int64_t extent(Random& random) {
    static constexpr std::int64_t edges[]{-1, 0, 1, 2, 63, 64, 65, 1 << 16, INT32_MAX, INT64_MAX, INT64_MIN};
    return below(random, 4) ? edges[below(random, std::size(edges))] : static_cast<std::int64_t>(random());
}

void mutate(Fields& fields, Random& random) {
    if (fields.fields.empty()) return;
    const std::size_t place = below(random, fields.fields.size());
    Fields::Field& field = fields.fields[place];
    switch (below(random, 9)) {
    case 0: field.length = static_cast<std::int32_t>(random() | 0x80000000U); break;  // negative
    case 1: field.type = static_cast<PluginFieldType>(below(random, 16)); break;
    case 2: field.noData = true; break;
    case 3: field.name[below(random, field.name.size())] = static_cast<char>(random()); break;
    case 4: fields.fields.erase(fields.fields.begin() + static_cast<std::ptrdiff_t>(place)); break;
    case 5: fields.fields.push_back(Fields::Field(field)); break;
    case 6:  // truncated
        if (field.type == PluginFieldType::kCHAR && !field.data.empty()) {
            field.data.resize(below(random, field.data.size()));
            field.length = static_cast<std::int32_t>(field.data.size());
        }
        break;
    case 7:  // longer
        if (field.type == PluginFieldType::kCHAR) {
            field.data.insert(field.data.end(), 1 + below(random, 200), static_cast<std::uint8_t>(random()));
            field.length = static_cast<std::int32_t>(field.data.size());
        }
        break;
    default:
        if (!field.data.empty())
            field.data[below(random, field.data.size())] ^= static_cast<std::uint8_t>(1U << below(random, 8));
    }
}

/// Whether the plugin serializes to what the original did.
bool sameAs(const Fields& original, IPluginV3& plugin) {
    const Fields now = Fields::copyOf(*runtime(plugin).getFieldsToSerialize());
    for (std::size_t i = 0; i < original.fields.size(); ++i) {
        if (now.fields[i].data != original.fields[i].data) return false;
    }
    return true;
}

void mutateTensor(PluginTensorDesc& tensor, Random& random) {
    switch (below(random, 4)) {
    case 0: tensor.dims.nbDims = static_cast<std::int32_t>(below(random, 12)) - 2; break;
    case 1: tensor.type = static_cast<DataType>(below(random, 14)); break;
    case 2: tensor.format = static_cast<TensorFormat>(below(random, 14)); break;
    default: tensor.dims.d[below(random, 8)] = extent(random);
    }
}

}  // namespace

void runMutations(const Session& session, int count) {
    Random random(20260209);
    int refused = 0;
    int silent = 0;
    int different = 0;
    int crooked = 0;
    for (int i = 0; i < count; ++i) {
        const Node& node = nodes()[below(random, nodes().size())];
        const auto plugin = node.fields().create(session, TensorRTPhase::kBUILD);
        const Fields original = Fields::copyOf(*runtime(*plugin).getFieldsToSerialize());
        Fields mutated = original;
        for (std::size_t times = 1 + below(random, 3); times > 0; --times) mutate(mutated, random);
        const auto created = mutated.create(session, TensorRTPhase::kRUNTIME);
        const bool logged = !takeLogged().empty();
        refused += !created;
        silent += !created && !logged;
        different += created && !sameAs(original, *created);

        auto tensors = node.tensors(6, 1);
        for (std::size_t times = 1 + below(random, 3); times > 0; --times)
            mutateTensor(tensors[below(random, tensors.size())], random);
        const auto ranges = dynamic(tensors);
        const auto inputs = static_cast<std::int32_t>(ranges.size()) - 1;
        build(*plugin).getWorkspaceSize(ranges.data(), inputs, &ranges.back(), 1);
        build(*plugin).supportsFormatCombination(inputs, ranges.data(), inputs, 1);
        takeLogged();
        const bool built = build(*plugin).configurePlugin(ranges.data(), inputs, &ranges.back(), 1) == 0;
        const bool accepted = changeShape(*plugin, tensors) == 0;
        crooked += (!built || !accepted) && takeLogged().empty();
    }
    std::printf("---- %d mutations, %d refused\n", count, refused);
    expect(silent == 0, "every refusal is logged");
    expect(different == 0, "nothing but the original is accepted");
    expect(crooked == 0, "every refused tensor is logged");
    expect(count == 0 || refused > count / 2, "most mutations do damage");
}
