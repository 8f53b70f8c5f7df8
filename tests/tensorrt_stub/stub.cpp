// A stub of libnvinfer and libcudart for tests of examples/cpp_host: device memory is the host's, and the
// network answers for each crop 68 times (first pixel, second pixel), and its third pixel / 256 as the lost score. The
// machine is made of environment variables: STUB_CAPABILITY (87), STUB_TENSORRT (100300), STUB_CUDA (12060),
// STUB_DEVICES (1). A plan is the text "STUB least most size", with " 1" behind it where it gives the lost score; any
// other is refused.
#include <NvInfer.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

int setting(const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}

int least, most, side, has_score = 0;
nvinfer1::ILogger* logger_of_runtime;
std::map<std::string, unsigned char*> addresses;
int64_t batch;

}  // namespace

extern "C" {
int32_t getInferLibVersion() noexcept { return setting("STUB_TENSORRT", 100300); }

cudaError_t cudaGetDeviceCount(int* count) {
    *count = setting("STUB_DEVICES", 1);
    return *count < 0 ? cudaErrorInsufficientDriver : cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const int capability = setting("STUB_CAPABILITY", 87);
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability / 10 : capability % 10;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
    *version = setting("STUB_CUDA", 12060);
    return cudaSuccess;
}
cudaError_t cudaMalloc(void** memory, size_t bytes) {
    *memory = std::malloc(bytes);
    return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    std::memset(memory, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned int) { return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "driver too old"; }
}

namespace nvinfer1 {

IRuntime* createInferRuntime(ILogger& logger) noexcept {
    logger_of_runtime = &logger;
    return new IRuntime;
}
void IRuntime::setDLACore(int32_t) noexcept {}
void IRuntime::setEngineHostCodeAllowed(bool) noexcept { std::fputs("host code is allowed\n", stderr); }
ICudaEngine* IRuntime::deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
    const std::string text(static_cast<const char*>(blob), size);
    if (std::sscanf(text.c_str(), "STUB %d %d %d %d", &least, &most, &side, &has_score) >= 3) return new ICudaEngine;
    logger_of_runtime->log(ILogger::Severity::kERROR, "the stub does not know this plan");
    return nullptr;
}

Dims ICudaEngine::getTensorShape(char const* name) const noexcept {
    if (std::strcmp(name, "crops") == 0) return Dims{4, {-1, 1, side, side}};
    if (std::strcmp(name, "lost_score") == 0) return has_score ? Dims{2, {-1, 1}} : Dims{-1, {}};
    return Dims{3, {-1, 68, 2}};
}
DataType ICudaEngine::getTensorDataType(char const* name) const noexcept {
    return std::strcmp(name, "crops") == 0 ? DataType::kUINT8 : DataType::kFLOAT;
}
TensorIOMode ICudaEngine::getTensorIOMode(char const* name) const noexcept {
    return std::strcmp(name, "crops") == 0 ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
}
Dims ICudaEngine::getProfileShape(char const*, int32_t, OptProfileSelector select) const noexcept {
    return {4, {select == OptProfileSelector::kMIN ? least : most, 1, side, side}};
}
IExecutionContext* ICudaEngine::createExecutionContext() noexcept { return new IExecutionContext; }

bool IExecutionContext::setInputShape(char const*, Dims const& dims) noexcept {
    batch = dims.d[0];
    return least <= batch && batch <= most;
}
bool IExecutionContext::setTensorAddress(char const* name, void* data) noexcept {
    addresses[name] = static_cast<unsigned char*>(data);
    return true;
}
bool IExecutionContext::enqueueV3(cudaStream_t) noexcept {
    if (has_score && !addresses["lost_score"]) return false;  // each output needs a place
    auto* scores = reinterpret_cast<float*>(addresses["lost_score"]);
    for (int64_t i = 0; has_score && i < batch; ++i) scores[i] = addresses["crops"][i * side * side + 2] / 256.0f;
    auto* keypoints = reinterpret_cast<float*>(addresses["keypoints"]);
    for (int64_t i = 0; i < batch * 136; ++i) keypoints[i] = addresses["crops"][i / 136 * side * side + i % 2];
    return true;
}

}  // namespace nvinfer1
