// One denoising step of a bundle that was exported with --target ncnn: text encoder, UNet with guidance, decoder.
//
//     python examples/ncnn/write_request.py BUNDLE "a cat" request.txt
//     one_step BUNDLE request.txt picture.ppm
//
// The request holds what the runtime works out in Python: tokens, noise, timestep, and the scheduler's constants.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "net.h"

struct Request {
    std::vector<int> negative, prompt;
    std::vector<float> latents;  // C x H x W
    int channels, height, width;
    float timestep, alpha, sigma, guidance, scaling;
};

static Request read_request(const char* path) {
    std::ifstream file(path);
    Request request;
    size_t tokens = 0;
    file >> tokens;
    if (tokens > 4096) throw std::runtime_error("too many tokens");
    request.negative.resize(tokens);
    request.prompt.resize(tokens);
    for (int& token : request.negative) file >> token;
    for (int& token : request.prompt) file >> token;
    file >> request.channels >> request.height >> request.width;
    file >> request.timestep >> request.alpha >> request.sigma >> request.guidance >> request.scaling;
    if (!file || request.channels < 1 || request.height < 1 || request.width < 1 || request.channels > 64 ||
        request.height > 1024 || request.width > 1024)
        throw std::runtime_error("no request");
    request.latents.resize((size_t)request.channels * request.height * request.width);
    for (float& value : request.latents) file >> value;
    if (!file) throw std::runtime_error("the request is cut");
    return request;
}

// One component. ncnn trusts its files: load only those of a bundle whose hashes you have checked.
struct Component {
    ncnn::Net net;

    explicit Component(const std::string& folder) {
        net.opt.use_winograd_convolution = false;  // in int8 its sums may leave 32 bits, from 64 channels on
        if (net.load_param((folder + "/model.ncnn.param").c_str()) || net.load_model((folder + "/model.ncnn.bin").c_str()))
            throw std::runtime_error("cannot load " + folder);
    }

    ncnn::Mat run(const std::vector<std::pair<const char*, ncnn::Mat>>& inputs, const char* output) const {
        ncnn::Extractor extractor = net.create_extractor();
        for (const auto& input : inputs)
            if (extractor.input(input.first, input.second)) throw std::runtime_error(input.first);
        ncnn::Mat result;
        if (extractor.extract(output, result)) throw std::runtime_error(output);
        return result;
    }
};

static ncnn::Mat mat_from_tokens(const std::vector<int>& tokens) {  // an Embed reads int32
    ncnn::Mat mat((int)tokens.size(), (size_t)4u);
    std::copy(tokens.begin(), tokens.end(), (int*)mat.data);
    return mat;
}

static ncnn::Mat mat_from_latents(const std::vector<float>& latents, const Request& request) {
    ncnn::Mat mat(request.width, request.height, request.channels);  // channels may be padded to whole lines
    const size_t size = (size_t)request.width * request.height;
    for (int c = 0; c < request.channels; c++)
        std::copy_n(latents.begin() + c * size, size, (float*)mat.channel(c));
    return mat;
}

static void write_ppm(const ncnn::Mat& image, const char* path) {  // 3 x H x W in [-1, 1]
    std::ofstream file(path, std::ios::binary);
    file << "P6\n" << image.w << " " << image.h << "\n255\n";
    for (int i = 0; i < image.w * image.h; i++)
        for (int c = 0; c < 3; c++) {
            const float value = (((const float*)image.channel(c))[i] + 1) * 127.5f + 0.5f;
            file.put((char)(unsigned char)std::min(std::max(value, 0.f), 255.f));
        }
}

int main(int argc, char** argv) try {
    if (argc != 4) throw std::runtime_error("usage: one_step BUNDLE REQUEST PICTURE");
    const std::string bundle = argv[1];
    const Request request = read_request(argv[2]);
    const Component text_encoder(bundle + "/text_encoder"), unet(bundle + "/unet"), decoder(bundle + "/vae_decoder");

    const ncnn::Mat latents = mat_from_latents(request.latents, request);
    ncnn::Mat timestep(1);
    timestep[0] = request.timestep;
    std::vector<float> predictions[2];  // of the negative prompt and of the prompt: ncnn has no batch
    const std::vector<int>* texts[2] = {&request.negative, &request.prompt};
    for (int row = 0; row < 2; row++) {
        const ncnn::Mat hidden = text_encoder.run({{"input_ids", mat_from_tokens(*texts[row])}}, "hidden");
        const ncnn::Mat noise = unet.run(
            {{"sample", latents}, {"timestep", timestep}, {"encoder_hidden_states", hidden}}, "noise_pred");
        for (int c = 0; c < noise.c; c++)
            predictions[row].insert(predictions[row].end(), (const float*)noise.channel(c),
                                    (const float*)noise.channel(c) + noise.w * noise.h);
    }
    std::vector<float> clean(request.latents.size());  // x0 = (x - sigma * noise) / alpha, in the decoder's scale
    for (size_t i = 0; i < clean.size(); i++) {
        const float noise = predictions[0][i] + request.guidance * (predictions[1][i] - predictions[0][i]);
        clean[i] = (request.latents[i] - request.sigma * noise) / request.alpha / request.scaling;
    }
    write_ppm(decoder.run({{"latents", mat_from_latents(clean, request)}}, "image"), argv[3]);
    return 0;
} catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
}
