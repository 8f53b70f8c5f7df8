// Runs the CUDA kernels on the CPU: as a library for ctypes, and as a program for the sanitizers.
#include "cuda_shim.h"

#include "../kp_runtime/preprocess.cu"

#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" int emulate(int order, int bytes, const void* image, const void* faces, int n, int size,
                       unsigned char* crops) {
    const auto kernel = bytes == 1 ? kp_crops_v2_1 : bytes == 3 ? kp_crops_v2_3 : kp_crops_v2_4;
    const unsigned int tiles = (size + TILE - 1) / TILE;
    shim_order = order;
    for (unsigned int z = 0; z < (unsigned int)n; ++z) {
        for (unsigned int y = 0; y < tiles; ++y) {
            for (unsigned int x = 0; x < tiles; ++x) {
                blockIdx = {x, y, z};
                kernel((const Image*)image, (const Face*)faces, size, crops);
            }
        }
    }
    return (int)(sizeof(Image) + sizeof(Face));
}

// Reads cases from a file: nine numbers (bytes, pitch, first, third, limited, n, size, length of the data, 0),
// the data, the faces. Each lies in memory of its exact size, so that a sanitizer sees what leaves it.
int main(int, char** argv) {
    std::FILE* file = std::fopen(argv[1], "rb");
    long long c[9];
    while (file && std::fread(c, sizeof(c), 1, file) == 1) {
        std::vector<unsigned char> data(c[7]), crops(c[5] * c[6] * c[6]);
        std::vector<Face> faces(c[5]);
        if (std::fread(data.data(), 1, data.size(), file) != data.size() ||
            std::fread(faces.data(), sizeof(Face), faces.size(), file) != faces.size()) {
            return 2;
        }
        const Image image{data.data(), c[1], (int)c[2], (int)c[3], (int)c[4], 0};
        emulate(2, c[0], &image, faces.data(), c[5], c[6], crops.data());
        std::fwrite(crops.data(), 1, crops.size(), stdout);
    }
    return file ? 0 : 2;
}
