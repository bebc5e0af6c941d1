// The calls of a build and of an execution, in TensorRT's order, for every layer and profile.

#include <algorithm>
#include <sstream>
#include <thread>

#include "harness.h"

using namespace nvinfer1;

namespace {

constexpr std::uintptr_t kWorkspace = 0xa00000;
constexpr std::uintptr_t kOutput = 0x900000;
constexpr int kCapability = 90;

std::uintptr_t addressOf(std::int32_t input) {
    return 0x10000U * static_cast<std::uintptr_t>(input + 1);
}

class Expression final : public IDimensionExpr {
  public:
    ~Expression() noexcept override = default;
};

class Builder final : public IExprBuilder {
  public:
    ~Builder() noexcept override = default;
};

std::vector<std::string> split(const std::string& text) {
    std::vector<std::string> parts;
    std::istringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
    return parts;
}

/// Complete combinations of types and formats that the plugin takes, found as the builder does: position by position.
std::vector<std::vector<DynamicPluginTensorDesc>> combinations(IPluginV3& plugin, std::int32_t inputs) {
    std::vector<std::vector<DynamicPluginTensorDesc>> partial{{}};
    for (std::int32_t position = 0; position <= inputs; ++position) {
        std::vector<std::vector<DynamicPluginTensorDesc>> longer;
        for (auto combination : partial) {
            combination.resize(static_cast<std::size_t>(inputs) + 1);
            for (int type = 0; type < EnumMax<DataType>(); ++type) {
                for (int format = 0; format < EnumMax<TensorFormat>(); ++format) {
                    PluginTensorDesc& desc = combination[static_cast<std::size_t>(position)].desc;
                    desc.type = static_cast<DataType>(type);
                    desc.format = static_cast<TensorFormat>(format);
                    if (build(plugin).supportsFormatCombination(position, combination.data(), inputs, 1)) {
                        longer.push_back(combination);
                    }
                }
            }
        }
        partial = longer;
    }
    return partial;
}

void checkCombinations(const Node& node, IPluginV3& plugin) {
    const auto inputs = static_cast<std::int32_t>(node.names().size());
    const auto found = combinations(plugin, inputs);
    const bool typed = node.profiles.find("16,") != std::string::npos && node.profiles.find("a16") == std::string::npos;
    const auto expected = node.tensors(6, 1);
    const bool ours = std::any_of(found.begin(), found.end(), [&](const auto& combination) {
        return std::equal(expected.begin(), expected.end(), combination.begin(), [](const auto& a, const auto& b) {
            return a.type == b.desc.type && a.format == b.desc.format;
        });
    });
    expect(ours && found.size() == (typed ? 1U : 2U),
           "supportsFormatCombination: " + std::to_string(found.size()) + " complete combinations");
}

void checkShapes(const Node& node, IPluginV3& plugin) {
    const auto tensors = node.tensors(6, 1);
    const auto inputs = static_cast<std::int32_t>(tensors.size()) - 1;
    std::vector<DataType> types;
    std::vector<DimsExprs> shapes;
    std::vector<Expression> expressions(64);
    for (std::int32_t i = 0; i < inputs; ++i) {
        types.push_back(tensors[static_cast<std::size_t>(i)].type);
        shapes.push_back({tensors[static_cast<std::size_t>(i)].dims.nbDims, {}});
        for (int d = 0; d < shapes.back().nbDims; ++d)
            shapes.back().d[d] = &expressions[static_cast<std::size_t>(3 * i + d)];
    }
    DataType type{};
    expect(build(plugin).getOutputDataTypes(&type, 1, types.data(), inputs) == 0 && type == node.type,
           "getOutputDataTypes");
    Builder builder;
    DimsExprs shape{};
    const bool accepted = build(plugin).getOutputShapes(shapes.data(), inputs, nullptr, 0, &shape, 1, builder) == 0;
    const DimsExprs& x = shapes[static_cast<std::size_t>(node.place("x"))];
    const auto isWeight = [](const std::string& name) {
        return name == "w4" || name == "w8" || name == "w16" || name == "w_fp8";
    };
    bool fits = accepted && shape.nbDims == 3 && shape.d[0] == x.d[0] && shape.d[1] == x.d[1];
    bool rows = false;
    for (std::int32_t i = 0; i < inputs; ++i) {
        rows |= isWeight(node.names()[static_cast<std::size_t>(i)]) &&
                shape.d[2] == shapes[static_cast<std::size_t>(i)].d[0];
    }
    expect(fits && rows, "getOutputShapes");
}

void checkConfiguration(const Session& session, const Node& node, IPluginV3& plugin) {
    auto tensors = dynamic(node.tensors(6, 1));
    const auto inputs = static_cast<std::int32_t>(tensors.size()) - 1;
    tensors[static_cast<std::size_t>(node.place("x"))].max.d[1] = 50;
    tensors[static_cast<std::size_t>(node.place("x"))].desc.dims.d[1] = -1;
    expect(build(plugin).configurePlugin(tensors.data(), inputs, &tensors.back(), 1) == 0, "configurePlugin");
    const bool quantizes =
        node.profiles.find("a8") != std::string::npos || node.profiles.find("fp8") != std::string::npos;
    const auto q = static_cast<std::size_t>(2 * 50 * node.k);
    const std::size_t expected = quantizes ? (q + 255) / 256 * 256 + 2 * 50 * 4 : 0;
    expect(build(plugin).getWorkspaceSize(tensors.data(), inputs, &tensors.back(), 1) == expected,
           "getWorkspaceSize: " + std::to_string(expected) + " bytes");
    const std::int32_t tactics = build(plugin).getNbTactics();
    std::vector<std::int32_t> values(static_cast<std::size_t>(tactics));
    expect(build(plugin).getValidTactics(values.data(), tactics) == 0 && tactics == (session.setCapability ? 2 : 0) &&
               std::count(values.begin(), values.end(), 0) == 0,
           "getNbTactics, getValidTactics: " + std::to_string(tactics));
}

std::unique_ptr<IPluginV3> checkSerialization(const Session& session, IPluginV3& plugin) {
    const Fields fields = Fields::copyOf(*runtime(plugin).getFieldsToSerialize());
    auto again = fields.create(session, TensorRTPhase::kRUNTIME);
    if (!expect(again != nullptr, "createPlugin from what getFieldsToSerialize gave")) return again;
    const Fields repeated = Fields::copyOf(*runtime(*again).getFieldsToSerialize());
    bool equal = fields.fields.size() == repeated.fields.size();
    for (std::size_t i = 0; equal && i < fields.fields.size(); ++i)
        equal = fields.fields[i].data == repeated.fields[i].data;
    expect(equal, "getFieldsToSerialize once more gives the same");
    expect(std::string(build(*again).getTimingCacheID()) == build(plugin).getTimingCacheID(), "getTimingCacheID");
    return again;
}

/// The launches that docs/plugin.md promises for a format, as the recording driver writes them.
std::string expectedLaunches(const Node& node, const std::string& format, std::int64_t m, int blockM,
                             std::uintptr_t stream) {
    const bool has16 = format == "fp16" || format == "bf16";
    const bool eight = format == "w8a8" || format == "w8a16";
    const bool nested = eight && node.inputs.find(",lo") != std::string::npos;
    const bool tokens = format == "w8a8" || format == "w4a8";
    const bool grouped = format == "w4a8" || format == "int4wo";
    const bool evenOdd = (nested && tokens) || format == "w4a8";
    const std::string gemm = has16                ? "gemm_16"
                             : format == "int4wo" ? "gemm_w4a16"
                             : nested             ? "gemm_" + format + "_nested"
                                                  : "gemm_" + format;
    const std::string weights = has16 ? "w16" : format == "fp8" ? "w_fp8" : grouped || nested ? "w4" : "w8";
    const std::string scales = format == "fp8" ? "w_fp8_scale" : grouped ? "w4_scale" : "w8_scale";
    const std::string dtype = node.type == DataType::kHALF ? "fp16" : "bf16";
    const std::string variant =
        "_sm" + std::to_string(kCapability) + "_" + dtype + (evenOdd ? "_even_odd" : "_natural");
    const std::uintptr_t scaleAddress = kWorkspace + static_cast<std::uintptr_t>((m * node.k + 255) / 256 * 256);

    std::ostringstream text;
    const auto pointer = [&](const char* name, std::uintptr_t value) {
        text << ' ' << name << "=0x" << std::hex << value << std::dec;
    };
    const auto input = [&](const char* name, const std::string& role) {
        const auto place = node.place(role);
        pointer(name, place < static_cast<std::int32_t>(node.names().size()) ? addressOf(place) : 0);
    };
    const bool hasSmoothing = node.inputs.find("smoothing") != std::string::npos;
    if (tokens || format == "fp8") {
        text << (tokens ? "quantize_tokens" : "quantize_fp8") << variant << "_g0_m1 grid=" << m
             << " threads=128 shared=0";
        pointer("stream", stream);
        input("x", "x");
        if (tokens) input("smooth", "smoothing");
        if (!tokens) input("scale", "x_fp8_scale");
        pointer("q", kWorkspace);
        if (tokens) pointer("scale", scaleAddress);
        text << " k=" << node.k;
        if (tokens) text << " maximum=127 has_smooth=" << hasSmoothing;
        text << " global_scratch=0x0 profile_scratch=0x0\n";
    }
    const std::int64_t tiles = ((m + blockM - 1) / blockM) * ((node.n + 63) / 64);
    text << gemm << variant << "_g" << (grouped ? node.groupSize : 0) << "_m" << blockM << " grid=" << tiles
         << " threads=" << (blockM == 16 ? 128 : 256) << " shared=" << (blockM == 16 ? 8192 : 131072);
    pointer("stream", stream);
    tokens || format == "fp8" ? pointer("x", kWorkspace) : input("x", "x");
    if (tokens) pointer("x_scale", scaleAddress);
    if (format == "fp8") input("x_scale", "x_fp8_scale");
    input(nested ? "w_high" : "w", weights);
    if (nested) input("w_low", "lo");
    if (!has16) input("w_scale", scales);
    input("bias", "bias");
    pointer("y", kOutput);
    text << " m=" << m << " n=" << node.n << " k=" << node.k
         << " has_bias=" << (node.inputs.find("bias") != std::string::npos)
         << " global_scratch=0x0 profile_scratch=0x0\n";
    return text.str();
}

std::int32_t enqueue(IPluginV3& plugin, const std::vector<PluginTensorDesc>& tensors, std::uintptr_t stream) {
    std::vector<const void*> inputs;
    for (std::int32_t i = 0; i + 1 < static_cast<std::int32_t>(tensors.size()); ++i) {
        inputs.push_back(reinterpret_cast<const void*>(addressOf(i)));
    }
    void* output = reinterpret_cast<void*>(kOutput);
    return runtime(plugin).enqueue(tensors.data(), &tensors.back(), inputs.data(), &output,
                                   reinterpret_cast<void*>(kWorkspace), reinterpret_cast<cudaStream_t>(stream));
}

/// onShapeChange and, with the recording driver, enqueue: each profile, few and many tokens, two streams.
void checkExecution(const Session& session, const Node& node, IPluginV3& plugin) {
    const auto formats = split(node.profiles);
    for (std::int64_t extent = 1; extent <= node.profileCount(); ++extent) {
        const std::string& format = formats[static_cast<std::size_t>(extent - 1)];
        for (const std::int64_t tokens : {std::int64_t{6}, std::int64_t{100}}) {
            const auto tensors = node.tensors(tokens, extent);
            expect(changeShape(plugin, tensors) == 0, "onShapeChange: selector " + std::to_string(extent) + " (" +
                                                          format + "), " + std::to_string(tokens) + " tokens");
            for (const std::uintptr_t stream : {std::uintptr_t{0x1}, std::uintptr_t{0x2}}) {
                if (!session.setCapability) continue;
                const bool done = enqueue(plugin, tensors, stream) == 0;
                const std::string launched = session.takeLaunches();
                const std::string expected = expectedLaunches(node, format, tokens, tokens == 6 ? 16 : 64, stream);
                if (!expect(done && launched == expected, "enqueue on stream " + std::to_string(stream))) {
                    std::printf("got\n%sexpected\n%s%s", launched.c_str(), expected.c_str(), takeLogged().c_str());
                }
            }
        }
    }
    if (!session.setCapability) return;
    runtime(plugin).setTactic(2);
    const auto tensors = node.tensors(6, 1);
    expect(changeShape(plugin, tensors) == 0 && enqueue(plugin, tensors, 1) == 0 &&
               session.takeLaunches() == expectedLaunches(node, formats.front(), 6, 64, 1),
           "setTactic 2 takes the second tile");
    runtime(plugin).setTactic(1);
    expect(
        enqueue(plugin, tensors, 1) == 0 && session.takeLaunches() == expectedLaunches(node, formats.front(), 6, 16, 1),
        "setTactic 1 alone takes the first tile");
    expect(changeShape(plugin, node.tensors(0, 1)) == 0 && enqueue(plugin, node.tensors(0, 1), 1) == 0 &&
               std::string(session.takeLaunches()).empty(),
           "no tokens, no launch");
}

/// Execution contexts of several threads share the loaded cubins.
void checkThreads(const Session& session, IPluginV3& plugin, const Node& node) {
    const int before = session.countLoads();
    std::vector<std::thread> threads;
    std::vector<int> results(8, -1);
    for (int& result : results) {
        threads.emplace_back([&plugin, &node, &result] {
            const std::unique_ptr<IPluginV3> own(runtime(plugin).attachToContext(nullptr));
            const auto tensors = node.tensors(6, 1);
            result = changeShape(*own, tensors);
            for (int i = 0; result == 0 && i < 20; ++i) result = enqueue(*own, tensors, 1);
        });
    }
    for (std::thread& thread : threads) thread.join();
    const std::string launches = session.takeLaunches();
    expect(
        std::count(results.begin(), results.end(), 0) == 8 && std::count(launches.begin(), launches.end(), '\n') == 320,
        "8 threads with a context each: 160 times enqueue");
    expect(session.countLoads() - before == 2, "each cubin is loaded once");
}

}  // namespace

void runCalls(const Session& session) {
    if (session.setCapability) {
        session.setCapability(kCapability);
        // First, so that nothing is loaded yet.
        const Node node{"w4a8", "x,selector,w4,w4_scale"};
        if (const auto plugin = node.fields().create(session, TensorRTPhase::kBUILD))
            checkThreads(session, *plugin, node);
    }
    for (const Node& node : nodes()) {
        std::printf("---- profiles=%s inputs=%s\n", node.profiles.c_str(), node.inputs.c_str());
        const auto plugin = node.fields().create(session, TensorRTPhase::kBUILD);
        if (!expect(plugin != nullptr, "createPlugin from fields")) continue;
        checkCombinations(node, *plugin);
        checkShapes(node, *plugin);
        checkConfiguration(session, node, *plugin);
        const auto deserialized = checkSerialization(session, *plugin);
        if (!deserialized) continue;
        const std::unique_ptr<IPluginV3> attached(runtime(*deserialized).attachToContext(nullptr));
        if (expect(attached != nullptr, "attachToContext")) checkExecution(session, node, *attached);
        const std::string logged = takeLogged();
        expect(logged.empty(), "nothing was logged" + (logged.empty() ? "" : ": " + logged));
    }
}
