// A bundle's TensorRT plan from C++: checked first, then loaded, then asked for the golden keypoints.
//
// What it does    reads manifest.json, compares signature, processor, GPU, TensorRT and sha256 before anything
//                 is deserialised (preflight.cpp), runs crops, compares with keypoints that are known
// What it leaves  to Python, or to you: a table in examples/README.md
// What it needs   a plan that was built on this device (kp plan BUNDLE --precision fp16); TensorRT 10.3 or
//                 newer, CUDA; nlohmann-json3-dev, libssl-dev. CMakeLists.txt has the two lines to build
// How to run      kp_host BUNDLE golden.crops golden.keypoints [release.pub.pem]
//                 With a key, its owner must have signed the bundle. The files are plain memory, this writes them:
//                 python3 -c "import numpy as np; g = np.load('BUNDLE/golden.npz'); g['crops'].tofile(
//                 'golden.crops'); [g[k].astype('<f4').tofile('golden.' + k) for k in g if k in (
//                 'keypoints', 'lost_score')]"
//                 crops: uint8 (n, 1, size, size); keypoints: float32 (n, points, 2), pixels of the crop;
//                 lost_score: float32 (n, 1), of a model that gives one, looked for beside the keypoints
//                 A host that cuts crops itself is tested with g['image'] and g['box_xyxy'], which the first
//                 crop was cut from (docs/export.md)
// What was run    the preflight as it is, with g++ 12. This file was compiled with CUDA's real headers and a
//                 stub of NvInfer.h that has the names used here, and run on a stub of both libraries.
//                 Not run: TensorRT, a GPU
#include <NvInfer.h>
#include <cuda_runtime_api.h>
#include <sys/utsname.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iostream>
#include <memory>

#include "preflight.h"

namespace {

using kp::Refused;

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess)
        throw Refused(std::string("CUDA failed to ") + what + ": " + cudaGetErrorString(status));
}

class Logger : public nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << "TensorRT: " << message << '\n';
    }
};

// Asked before TensorRT is: without a device that works, its runtime ends the process.
kp::Machine this_machine() {
    int devices = 0, major = 0, minor = 0;
    check(cudaGetDeviceCount(&devices), "find a GPU (is the driver loaded?)");
    if (devices == 0) throw Refused("there is no CUDA GPU here");
    check(cudaSetDevice(0), "use the first GPU");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "ask for the GPU's kind");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "ask for the GPU's kind");
    const int version = getInferLibVersion();  // (major * 100 + minor) * 100 + patch, from TensorRT 10 on
    utsname system{};
    uname(&system);
    return {major * 10 + minor, {version / 10000, version / 100 % 100, version % 100}, system.machine};
}

struct Free {
    void operator()(void* memory) const { cudaFree(memory); }
};
using DeviceMemory = std::unique_ptr<void, Free>;

DeviceMemory device_memory(std::size_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, bytes), "allocate memory");
    return DeviceMemory(memory);
}

struct Answer {
    std::vector<float> keypoints;  // (n, points, 2), pixels of the crop
    std::vector<float> scores;     // (n), whether there is no face; empty of a model that does not say
};

class Network {
  public:
    explicit Network(const kp::Plan& plan) : size_(plan.size), points_(plan.points) {
        runtime_.reset(nvinfer1::createInferRuntime(logger_));
        if (!runtime_) throw Refused("TensorRT gives no runtime; its message is above");
        if (plan.runs_host_code) runtime_->setEngineHostCodeAllowed(true);  // its sha256 is known
        if (plan.dla_core >= 0) runtime_->setDLACore(plan.dla_core);
        engine_.reset(runtime_->deserializeCudaEngine(plan.bytes.data(), plan.bytes.size()));
        if (!engine_) throw Refused("TensorRT can't load " + plan.name + "; its message is above; build it here again");
        check_tensor("crops", nvinfer1::TensorIOMode::kINPUT, nvinfer1::DataType::kUINT8, {1, size_, size_});
        check_tensor("keypoints", nvinfer1::TensorIOMode::kOUTPUT, nvinfer1::DataType::kFLOAT, {points_, 2});
        if (plan.has_score) check_tensor(kScore, nvinfer1::TensorIOMode::kOUTPUT, nvinfer1::DataType::kFLOAT, {1});
        least_ = static_cast<int>(engine_->getProfileShape("crops", 0, nvinfer1::OptProfileSelector::kMIN).d[0]);
        most_ = static_cast<int>(engine_->getProfileShape("crops", 0, nvinfer1::OptProfileSelector::kMAX).d[0]);
        context_.reset(engine_->createExecutionContext());
        if (!context_) throw Refused("TensorRT has no memory for an execution context");
        input_ = device_memory(most_ * crop_bytes());
        output_ = device_memory(most_ * result_bytes());
        if (plan.has_score) score_ = device_memory(most_ * sizeof(float));
        check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream");
        check(cudaMemsetAsync(input_.get(), 0, most_ * crop_bytes(), stream_), "clear memory");
    }
    ~Network() { cudaStreamDestroy(stream_); }
    Network(const Network&) = delete;
    Network& operator=(const Network&) = delete;

    std::size_t crop_bytes() const { return static_cast<std::size_t>(size_) * size_; }
    std::size_t result_bytes() const { return static_cast<std::size_t>(points_) * 2 * sizeof(float); }

    // crops: n of uint8 (1, size, size).
    Answer operator()(const char* crops, int n) {
        std::vector<float> keypoints(n * result_bytes() / sizeof(float)), scores(score_ ? n : 0);
        for (int start = 0; start < n; start += most_) {
            const int count = std::min(n - start, most_);
            auto* answer = reinterpret_cast<char*>(keypoints.data()) + start * result_bytes();
            check(cudaMemcpyAsync(input_.get(), crops + start * crop_bytes(), count * crop_bytes(),
                                  cudaMemcpyHostToDevice, stream_), "copy crops");
            // a profile may ask for more crops than there are: what else lies in the memory fills it up
            const nvinfer1::Dims4 shape{std::max(count, least_), 1, size_, size_};
            if (!context_->setInputShape("crops", shape) || !context_->setTensorAddress("crops", input_.get()) ||
                !context_->setTensorAddress("keypoints", output_.get()) ||
                (score_ && !context_->setTensorAddress(kScore, score_.get())) || !context_->enqueueV3(stream_))
                throw Refused("TensorRT failed on " + std::to_string(count) + " crops; its message is above");
            check(cudaMemcpyAsync(answer, output_.get(), count * result_bytes(), cudaMemcpyDeviceToHost, stream_),
                  "copy keypoints");
            if (score_)
                check(cudaMemcpyAsync(scores.data() + start, score_.get(), count * sizeof(float),
                                      cudaMemcpyDeviceToHost, stream_), "copy scores");
            check(cudaStreamSynchronize(stream_), "run the network");
        }
        return {keypoints, scores};
    }

  private:
    void check_tensor(const char* name, nvinfer1::TensorIOMode mode, nvinfer1::DataType type, std::vector<int> shape) {
        const auto dims = engine_->getTensorShape(name);
        bool fits = engine_->getTensorIOMode(name) == mode && engine_->getTensorDataType(name) == type &&
                    dims.nbDims == static_cast<int>(shape.size()) + 1;
        for (std::size_t i = 0; fits && i < shape.size(); ++i) fits = dims.d[i + 1] == shape[i];
        if (!fits) throw Refused(std::string("the plan's tensor ") + name + " is not the contract's; build it again");
    }

    static constexpr const char* kScore = "lost_score";
    int size_, points_, least_ = 1, most_ = 1;
    Logger logger_;  // outlives what is made with it
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    DeviceMemory input_, output_, score_;
    cudaStream_t stream_ = nullptr;
};

// kp_runtime's limits, in pixels of the crop
double tolerance_of(const kp::Plan& plan) {
    const double at_224 = plan.precision == "fp32" ? 0.02 : plan.precision == "fp16" ? 0.5 : 2.0;
    return at_224 * plan.size / 224;
}

// and of the lost score
double score_tolerance_of(const kp::Plan& plan) {
    return plan.precision == "fp32" ? 0.002 : plan.precision == "fp16" ? 0.02 : 0.2;
}

std::vector<float> floats_of(const std::vector<char>& bytes) {
    std::vector<float> numbers(bytes.size() / sizeof(float));
    std::copy_n(bytes.data(), bytes.size(), reinterpret_cast<char*>(numbers.data()));
    return numbers;
}

// The larger one, or the NaN.
double worse(double worst, double off) { return std::isnan(worst) || off <= worst ? worst : off; }

void run(const char* bundle, const char* crops_path, const char* keypoints_path, const char* public_key) {
    const auto key = public_key ? std::optional<std::filesystem::path>(public_key) : std::nullopt;
    const auto plan = kp::checked_plan(bundle, this_machine(), key);
    Network network(plan);
    const auto crops = kp::bytes_of(crops_path), known = kp::bytes_of(keypoints_path);
    const auto n = crops.size() / network.crop_bytes();
    if (n == 0 || crops.size() != n * network.crop_bytes() || known.size() != n * network.result_bytes())
        throw Refused(std::string(crops_path) + " and " + keypoints_path + " are not n crops of " +
                      std::to_string(plan.size) + " px and their keypoints; main.cpp's head has the line that writes them");
    const auto scores_path = std::filesystem::path(keypoints_path).replace_extension("lost_score");
    const bool is_there = plan.has_score && std::filesystem::exists(scores_path);
    const auto known_scores = is_there ? kp::bytes_of(scores_path) : std::vector<char>();
    if (known_scores.size() != (plan.has_score ? n * sizeof(float) : 0))
        throw Refused(scores_path.string() + " is missing, or has not the lost score of each crop, which this model "
                      "gives; main.cpp's head has the line that writes it");
    const auto found = network(crops.data(), static_cast<int>(n));
    const auto wanted = floats_of(known), wanted_scores = floats_of(known_scores);
    double worst = 0, worst_score = 0;
    for (std::size_t i = 0; i < wanted.size(); i += 2)
        worst = worse(worst, std::hypot(found.keypoints[i] - wanted[i], found.keypoints[i + 1] - wanted[i + 1]));
    for (std::size_t i = 0; i < wanted_scores.size(); ++i)
        worst_score = worse(worst_score, std::abs(found.scores[i] - wanted_scores[i]));
    std::printf("{\"plan\": \"%s\", \"crops\": %zu, \"worst_px\": %.4f", plan.name.c_str(), n, worst);
    if (plan.has_score) std::printf(", \"worst_score\": %.4f", worst_score);
    std::printf("}\n");
    const bool points_are_right = worst <= tolerance_of(plan);
    if (!points_are_right || !(worst_score <= score_tolerance_of(plan)))
        throw Refused((points_are_right
                           ? "a golden lost score is further than " + std::to_string(score_tolerance_of(plan))
                           : "a golden keypoint is further than " + std::to_string(tolerance_of(plan)) + " px") +
                      " from PyTorch's: this machine computes the model wrongly; build the plan again");
}

}  // namespace

int main(int count, char** words) {
    if (count != 4 && count != 5) {
        std::cerr << "usage: kp_host BUNDLE CROPS KEYPOINTS [PUBLIC_KEY]\n";
        return 2;
    }
    try {
        run(words[1], words[2], words[3], words[4]);  // without a key a null pointer ends the words
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
}
