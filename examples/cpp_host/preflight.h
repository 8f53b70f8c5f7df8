// What is known of a plan before TensorRT sees it. Needs neither CUDA nor TensorRT.
//
// A plan is machine code: one of another GPU or TensorRT version fails in strange ways, and one that
// somebody changed can do anything. So the manifest is asked first, and the bytes that are loaded are
// the bytes whose sha256 was compared. Who can change a plan can change its sha256 too: take a public key.
#pragma once

#include <filesystem>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace kp {

// Why something can't be used, and what to do: one line.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Machine {
    int compute_capability;     // 87 of 8.7
    std::vector<int> tensorrt;  // 10, 3, 0
    std::string processor;      // as uname calls it: aarch64
};

struct Plan {
    std::string name;
    std::string precision;    // fp32, fp16, int8
    std::vector<char> bytes;  // whose sha256 is the manifest's
    int size = 0;             // side of a crop in pixels
    int points = 0;
    bool runs_host_code = false;  // a version-compatible plan brings its own run-time
    int dla_core = -1;
    bool has_score = false;  // whether it also says, in the output lost_score, that a box holds no face
};

// The bundle's plan that fits this machine: the first int8 one, else fp16, else fp32. With a public key, a PEM file,
// its owner must have signed the bundle (docs/signing.md).
// Throws Refused: no bundle, not signed so, no plan that fits (with each one's reason), a file that is missing or changed.
Plan checked_plan(const std::filesystem::path& bundle, const Machine& machine,
                  const std::optional<std::filesystem::path>& public_key = std::nullopt);

// A whole file. Throws Refused.
std::vector<char> bytes_of(const std::filesystem::path& path);

// 10, 3, 0 of "10.3.0". Throws Refused.
std::vector<int> numbers_of(const std::string& version);

}  // namespace kp
