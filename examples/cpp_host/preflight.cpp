#include "preflight.h"

#include <openssl/evp.h>
#include <openssl/pem.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

namespace kp {
namespace {

using nlohmann::ordered_json;

constexpr int kSchema = 1;
constexpr std::uintmax_t kLargestFile = 2ull << 30;
constexpr const char* kBestFirst[] = {"int8", "fp16", "fp32"};  // as kp_runtime/backend_by_name.py prefers plans
constexpr char kSigned[] = "kp-edge bundle manifest, signature 1\n";  // stands before the manifest: docs/signing.md

std::string sha256_of(const std::vector<char>& bytes) {
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned int length = 0;
    if (EVP_Digest(bytes.data(), bytes.size(), digest.data(), &length, EVP_sha256(), nullptr) != 1)
        throw Refused("libcrypto can't compute a sha256");
    std::string text;
    for (unsigned int i = 0; i < length; ++i) {
        constexpr char kDigits[] = "0123456789abcdef";
        text += {kDigits[digest[i] >> 4], kDigits[digest[i] & 15]};
    }
    return text;
}

// Throws Refused unless the key's owner signed a manifest of these bytes.
void check_signature(const std::filesystem::path& bundle, const std::vector<char>& manifest,
                     const std::filesystem::path& public_key) {
    const std::unique_ptr<BIO, decltype(&BIO_free)> pem(BIO_new_file(public_key.c_str(), "rb"), BIO_free);
    const std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)> key(
        pem ? PEM_read_bio_PUBKEY(pem.get(), nullptr, nullptr, nullptr) : nullptr, EVP_PKEY_free);
    if (!key || EVP_PKEY_get_base_id(key.get()) != EVP_PKEY_ED25519)
        throw Refused("the key '" + public_key.string() +
                      "' is no Ed25519 public key in PEM: give the .pub.pem that kp sign --new-key wrote");
    const auto path = bundle / "manifest.sig";
    if (!std::filesystem::exists(path))
        throw Refused(bundle.string() + " is not signed, and a public key was given; get the signed bundle");
    const auto signature = bytes_of(path);
    std::string text(kSigned);
    text.append(manifest.begin(), manifest.end());
    const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
    if (!context || EVP_DigestVerifyInit(context.get(), nullptr, nullptr, nullptr, key.get()) != 1 ||
        EVP_DigestVerify(context.get(), reinterpret_cast<const unsigned char*>(signature.data()), signature.size(),
                         reinterpret_cast<const unsigned char*>(text.data()), text.size()) != 1)
        throw Refused(path.string() + " is no signature of this manifest by the public key that was given: the manifest "
                      "was changed, or another key signed it; get the bundle again from whom you trust");
}

std::string text_of(const std::vector<int>& version) {
    std::ostringstream text;
    for (std::size_t i = 0; i < version.size(); ++i) text << (i ? "." : "") << version[i];
    return text.str();
}

// Why a plan can't run here, by its manifest's entry; empty where it can. The rules of kp_runtime/backend_trt.py.
std::string mismatch(const ordered_json& made, const Machine& machine) {
    const auto& options = made.at("options");
    const auto capability = numbers_of(made.at("compute_capability").get<std::string>());
    const auto built = numbers_of(made.at("tensorrt").get<std::string>());
    const int built_for = capability.at(0) * 10 + (capability.size() > 1 ? capability[1] : 0);
    const bool any_newer = options.at("version_compatible").get<bool>();
    const bool any_ampere = options.at("hardware_compatible").get<bool>();

    // older entries do not say; TensorRT does not carry plans from one kind of machine to another
    if (const auto processor = made.value("processor", machine.processor); processor != machine.processor)
        return "is for a " + processor + " machine, this one is " + machine.processor;
    if (machine.compute_capability != built_for &&
        !(any_ampere && built_for >= 80 && machine.compute_capability >= 80))
        return "is for " + made.at("gpu").get<std::string>() + " (sm_" + std::to_string(built_for) +
               "), this GPU is sm_" + std::to_string(machine.compute_capability);
    const auto shared = static_cast<std::ptrdiff_t>(std::min(built.size(), machine.tensorrt.size()));
    const bool is_same = std::equal(built.begin(), built.begin() + shared, machine.tensorrt.begin());
    if (!is_same && !(any_newer && machine.tensorrt > built))
        return "is for TensorRT " + text_of(built) + ", here is " + text_of(machine.tensorrt);
    return "";
}

// The file of an entry, compared with it.
std::vector<char> checked_bytes(const std::filesystem::path& path, const ordered_json& entry) {
    auto bytes = bytes_of(path);
    if (bytes.size() != entry.at("bytes").get<std::size_t>())
        throw Refused(path.string() + " has " + std::to_string(bytes.size()) + " bytes, the manifest says " +
                      entry.at("bytes").dump() + ": it is cut off or was replaced; copy the bundle again");
    const auto wanted = entry.at("sha256").get<std::string>(), found = sha256_of(bytes);
    if (found != wanted)
        throw Refused(path.string() + " has sha256 " + found.substr(0, 12) + "..., the manifest says " +
                      wanted.substr(0, 12) + "...: the file was changed; copy the bundle again");
    return bytes;
}

Plan plan_of(const std::filesystem::path& bundle, const ordered_json& manifest, const Machine& machine) {
    if (const auto schema = manifest.at("schema").get<int>(); schema != kSchema)
        throw Refused(bundle.string() + ": its schema is " + std::to_string(schema) + ", this program reads " + std::to_string(kSchema));
    std::string reasons, rebuild = "kp plan BUNDLE --precision fp16";
    std::vector<std::pair<std::string, bool>> places;  // one for other TensorRTs or GPUs too is slower, and comes behind
    for (const std::string precision : kBestFirst) places.insert(places.end(), {{precision, false}, {precision, true}});
    for (const auto& [precision, wide] : places)
        for (const auto& [name, entry] : manifest.at("files").items()) {
            if (entry.at("kind") != "plan" || entry.at("precision") != precision) continue;
            if (wide != (name.find(".newer.") != name.npos || name.find(".ampere.") != name.npos)) continue;
            if (name.find_first_of("/\\") != std::string::npos)
                throw Refused(bundle.string() + ": it names the file " + name);
            const auto& made = entry.at("made");
            std::string reason;
            try {
                reason = mismatch(made, machine);
            } catch (const std::exception& error) {
                reason = std::string("has an entry that does not say for which GPU and TensorRT it is (") +
                         error.what() + ")";
            }
            if (reason.empty()) {
                const auto& options = made.at("options");
                const auto dla = options.value("dla_core", ordered_json());
                const auto& spec = manifest.at("spec");
                return {name, precision, checked_bytes(bundle / name, entry), spec.at("size"),
                        spec.at("points"), options.at("version_compatible"), dla.is_null() ? -1 : dla.get<int>(),
                        !spec.value("lost_limit", ordered_json()).is_null()};
            }
            if (reasons.empty()) rebuild = made.value("rebuild", rebuild);
            reasons += (reasons.empty() ? "" : "; ") + name + " " + reason;
        }
    throw Refused(bundle.string() + ": " + (reasons.empty() ? "it has no plan" : reasons) + "; build one here: " + rebuild);
}

}  // namespace

std::vector<char> bytes_of(const std::filesystem::path& path) {
    std::error_code error;
    const auto size = std::filesystem::file_size(path, error);
    std::ifstream file(path, std::ios::binary);
    if (error || !file) throw Refused(path.string() + " can't be read: it is missing or no plain file");
    if (size > kLargestFile) throw Refused(path.string() + " is larger than 2 GiB; no bundle has such a file");
    std::vector<char> bytes(size);
    if (!file.read(bytes.data(), static_cast<std::streamsize>(size)))
        throw Refused(path.string() + " can't be read to its end");
    return bytes;
}

std::vector<int> numbers_of(const std::string& version) {
    std::vector<int> numbers;
    std::istringstream parts(version);
    for (std::string part; std::getline(parts, part, '.');) {
        if (!numbers.empty() && part.rfind("post", 0) == 0) break;  // TensorRT's wheels may be packed a second time
        if (part.empty() || part.size() > 6 || part.find_first_not_of("0123456789") != std::string::npos)
            throw Refused("the version '" + version + "' is no numbers with dots between");
        numbers.push_back(std::stoi(part));
    }
    if (numbers.empty()) throw Refused("a version is empty");
    return numbers;
}

Plan checked_plan(const std::filesystem::path& bundle, const Machine& machine,
                  const std::optional<std::filesystem::path>& public_key) {
    const auto path = bundle / "manifest.json";
    const auto text = bytes_of(path);
    if (public_key) check_signature(bundle, text, *public_key);
    try {
        return plan_of(bundle, ordered_json::parse(text.begin(), text.end()), machine);
    } catch (const ordered_json::exception& error) {
        throw Refused(path.string() + " can't be used (" + error.what() + "); make the bundle again");
    } catch (const std::out_of_range&) {
        throw Refused(path.string() + " has a version without its parts; make the bundle again");
    }
}

}  // namespace kp
