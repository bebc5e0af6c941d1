// Each mistake gives a failure and one logged sentence with the given words; nothing crashes.

#include <cstring>
#include <functional>

#include "harness.h"

using namespace nvinfer1;

namespace {

const Node kNode{"w8a8,w4a8", "x,selector,bias,w4,w4_scale,lo,w8_scale"};

void expectLogged(bool failed, const std::string& words, const std::string& what) {
    const std::string logged = takeLogged();
    expect(failed && logged.find(words) != std::string::npos,
           what + ": " + (logged.empty() ? "nothing logged\n" : logged).substr(0, logged.find('\n')));
}

void checkAttributes(const Session& session) {
    const auto refuse = [&](const char* what, const Fields& fields, const char* words,
                            TensorRTPhase phase = TensorRTPhase::kBUILD) {
        expectLogged(!fields.create(session, phase), words, what);
    };
    const auto node = [](const char* profiles, const char* inputs, std::int32_t group = 64) {
        return Fields::ofNode(profiles, inputs, group);
    };
    refuse("unknown profile", node("w8a8,w2a8", "x,selector,w8,w8_scale"), "unknown name 'w2a8'");
    refuse("empty profiles", node("", "x,selector,w8,w8_scale"), "'profiles' has 0 values");
    refuse("trailing comma", node("w8a8,", "x,selector,w8,w8_scale"), "unknown name ''");
    refuse("unknown input", node("w8a8", "x,selector,w8,w8_scales"), "unknown name 'w8_scales'");
    refuse("repeated input", node("w8a8", "x,selector,w8,w8_scale,x"), "'x' more than once");
    refuse("no selector", node("w8a8", "x,w8,w8_scale"), "lacks 'selector'");
    refuse("no scales", node("w8a8", "x,selector,w8"), "reads 'w8_scale'");
    refuse("unused input", node("w8a8", "x,selector,w8,w8_scale,w16"), "'w16' is read by none");
    refuse("smoothing without tokens", node("int4wo", "x,selector,w4,w4_scale,smoothing"), "cannot have 'smoothing'");
    refuse("group size", node("w4a8", "x,selector,w4,w4_scale", 32), "'group_size' is 32");

    const auto damage = [&](const char* what, const std::function<void(Fields&)>& change, const char* words) {
        Fields fields = kNode.fields();
        change(fields);
        refuse(what, fields, words);
    };
    damage("wrong type", [](Fields& f) { f.fields[0].type = PluginFieldType::kFLOAT32; }, "has the type 1");
    damage("wrong count", [](Fields& f) { f.fields[2].length = 2; }, "'group_size' has 2 values");
    damage("negative count", [](Fields& f) { f.fields[0].length = -1; }, "'profiles' has -1 values");
    damage("no data", [](Fields& f) { f.fields[1].noData = true; }, "'inputs' has no data");
    damage("missing field", [](Fields& f) { f.fields.erase(f.fields.begin()); }, "are required");
    damage("repeated field", [](Fields& f) { f.fields.push_back(f.fields[0]); }, "appears twice");
    damage("unknown field", [](Fields& f) { f.fields[2].name = "group"; }, "unknown field 'group'");
    refuse("not serialized", kNode.fields(), "version 0", TensorRTPhase::kRUNTIME);
    expectLogged(!session.creator->createPlugin("layer", nullptr, TensorRTPhase::kBUILD), "no list",
                 "no fields at all");
}

void checkSerialized(const Session& session) {
    const auto plugin = kNode.fields().create(session, TensorRTPhase::kBUILD);
    const Fields good = Fields::copyOf(*runtime(*plugin).getFieldsToSerialize());
    Fields truncated = good;
    truncated.fields[0].data.resize(4);
    truncated.fields[0].length = 4;  // "w8a8" of "w8a8,w4a8"
    Fields other = good;
    other.fields[3].data[0] = 99;
    expectLogged(!truncated.create(session, TensorRTPhase::kRUNTIME), "damaged", "truncated serialization");
    expectLogged(!other.create(session, TensorRTPhase::kRUNTIME), "version 99", "serialization of another version");
}

void checkTensors(const Session& session) {
    const auto plugin = kNode.fields().create(session, TensorRTPhase::kBUILD);
    using Tensors = std::vector<PluginTensorDesc>;
    const auto refuse = [&](const char* what, const std::function<void(Tensors&)>& change, const char* words) {
        Tensors tensors = kNode.tensors(6, 1);
        change(tensors);
        expectLogged(changeShape(*plugin, tensors) != 0, words, what);
        const auto ranges = dynamic(tensors);
        const auto inputs = static_cast<std::int32_t>(ranges.size()) - 1;
        expectLogged(build(*plugin).configurePlugin(ranges.data(), inputs, &ranges.back(), 1) != 0, words,
                     std::string(what) + ", when built");
    };
    const auto at = [](const char* name) { return static_cast<std::size_t>(kNode.place(name)); };
    refuse("selector beyond the profiles", [&](Tensors& t) { t[at("selector")].dims.d[1] = 3; }, "last extent is 3");
    refuse("selector of extent 0", [&](Tensors& t) { t[at("selector")].dims.d[1] = 0; }, "last extent is 0");
    refuse("plane of another width", [&](Tensors& t) { t[at("w4")].dims.d[1] = 63; }, "'w4' has the shape [192, 63]");
    refuse("low plane of another height", [&](Tensors& t) { t[at("lo")].dims.d[0] = 191; }, "'lo' has the shape");
    refuse("K no multiple of the group", [&](Tensors& t) { t[at("x")].dims.d[2] = 100; }, "K = 100 is not a multiple");
    refuse("bias of another length", [&](Tensors& t) { t[at("bias")].dims.d[0] = 3; }, "'bias' has the shape [3]");
    refuse("scales of another shape", [&](Tensors& t) { t[at("w4_scale")].dims.d[1] = 9; }, "'w4_scale' has the shape");
    refuse("output of another shape", [](Tensors& t) { t.back().dims.d[2] = 9; }, "y has the shape");
    refuse("output of another type", [](Tensors& t) { t.back().type = DataType::kFLOAT; }, "y has the type");
    refuse("x in fp32", [&](Tensors& t) { t[at("x")].type = DataType::kFLOAT; }, "x has the type 0");
    refuse("weights of another type", [&](Tensors& t) { t[at("w4")].type = DataType::kFLOAT; }, "'w4' has the type");
    refuse("vector format", [&](Tensors& t) { t[at("x")].format = TensorFormat::kHWC8; }, "tensor format 2");
    refuse("unknown extent", [&](Tensors& t) { t[at("x")].dims.d[0] = -1; }, "which is not known");
    refuse("too many dimensions", [&](Tensors& t) { t[at("x")].dims.nbDims = 99; }, "99 dimensions");
    refuse("too many tokens", [&](Tensors& t) { t[at("x")].dims.d[0] = INT64_MAX; }, "too large");
    refuse("2^31 elements", [&](Tensors& t) { t[at("x")].dims.d[0] = 1 << 24; }, "fewer than 2^31");
    refuse("input too few", [](Tensors& t) { t.erase(t.begin()); }, "6 inputs");
}

void checkDevices(const Session& session) {
    const auto plugin = kNode.fields().create(session, TensorRTPhase::kBUILD);
    const auto tensors = kNode.tensors(6, 1);
    const auto launchOn = [&](int capability) {
        session.setCapability(capability);
        return changeShape(*plugin, tensors) == 0;
    };
    expectLogged(!launchOn(75), "runs on compute capability 7.5; embedded are sm80, sm90", "a GPU without a cubin");
    expectLogged(!launchOn(100), "runs on compute capability 10.0", "a later GPU without a cubin");
    expect(launchOn(89), "8.9 takes the cubin of sm80, its family");
    const auto tacticsOn = [&](int capability) {
        session.setCapability(capability);
        return build(*plugin).getNbTactics();
    };
    expect(tacticsOn(80) == 2 && tacticsOn(89) == 0, "8.9 has no shared memory for the larger tile of sm80");

    const Node fp8{"fp8", "x,selector,w_fp8,w_fp8_scale,x_fp8_scale"};
    const auto fp8Plugin = fp8.fields().create(session, TensorRTPhase::kBUILD);
    expectLogged(changeShape(*fp8Plugin, fp8.tensors(6, 1)) != 0, "embedded are sm90", "fp8 on a GPU without it");

    const Node odd{"w8a8", "x,selector,w8,w8_scale", 64, 192, 100};
    const auto oddPlugin = odd.fields().create(session, TensorRTPhase::kBUILD);
    expectLogged(changeShape(*oddPlugin, odd.tensors(6, 1)) != 0, "K = 100", "K that no kernel takes");

    // A GPU that is there for onShapeChange and gone, or another, for enqueue.
    const void* inputs[16]{};
    void* output = nullptr;
    const auto enqueue = [&] {
        return runtime(*plugin).enqueue(tensors.data(), &tensors.back(), inputs, &output, nullptr, nullptr);
    };
    expectLogged(enqueue() != 0, "no workspace", "no workspace");
    session.setCapability(0);
    expectLogged(enqueue() != 0, "no CUDA context", "no CUDA context");
    session.setCapability(90);
}

}  // namespace

void runBadInput(const Session& session) {
    std::printf("---- bad input\n");
    checkAttributes(session);
    checkSerialized(session);
    checkTensors(session);
    if (session.setCapability) checkDevices(session);
    const auto plugin = kNode.fields().create(session, TensorRTPhase::kBUILD);
    expectLogged(runtime(*plugin).enqueue(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr) != 0,
                 "onShapeChange has not", "enqueue before onShapeChange");
}
