// The perplexity of a GGUF model in llama.cpp, by the protocol of `slimllm eval`: windows that do
// not overlap, of a text that is tokenized whole with no token put in front; of each window the
// mean negative log-likelihood of all tokens but the first.
//
// Usage: perplexity MODEL.gguf TEXT CONTEXT WINDOWS. Prints one JSON object.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void fail(const char *what) {
    std::fprintf(stderr, "error: %s\n", what);
    std::exit(2);
}

static std::vector<llama_token> tokenize(const llama_vocab *vocab, const std::string &text) {
    std::vector<llama_token> tokens(text.size() + 8);
    const bool add_special = false, parse_special = true;
    const int count = llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(),
                                     add_special, parse_special);
    if (count < 0) fail("the text has more tokens than bytes");
    tokens.resize(count);
    return tokens;
}

static double negative_log_likelihood(const float *logits, int vocab_size, llama_token token) {
    double largest = logits[0], sum = 0;
    for (int i = 1; i < vocab_size; i++) largest = std::fmax(largest, logits[i]);
    for (int i = 0; i < vocab_size; i++) sum += std::exp(logits[i] - largest);
    return std::log(sum) + largest - logits[token];
}

int main(int argc, char **argv) {
    if (argc != 5) fail("expected MODEL.gguf TEXT CONTEXT WINDOWS");
    const int context = std::atoi(argv[3]), windows = std::atoi(argv[4]);
    std::ifstream file(argv[2], std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model *model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) fail("llama.cpp cannot load the model");
    const llama_vocab *vocab = llama_model_get_vocab(model);
    const int vocab_size = llama_vocab_n_tokens(vocab);
    const std::vector<llama_token> tokens = tokenize(vocab, text.str());
    if ((size_t)context * windows > tokens.size()) fail("the text is too short");

    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = context;
    llama_context *session = llama_init_from_model(model, params);
    if (!session) fail("llama.cpp cannot make a context");
    llama_batch batch = llama_batch_init(context, 0, 1);
    double sum = 0;
    for (int window = 0; window < windows; window++) {
        const llama_token *first = tokens.data() + (size_t)window * context;
        batch.n_tokens = context;
        for (int i = 0; i < context; i++) {
            batch.token[i] = first[i];
            batch.pos[i] = i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        llama_memory_clear(llama_get_memory(session), true);
        if (llama_decode(session, batch) != 0) fail("llama.cpp cannot run the model");
        double window_sum = 0;
        for (int i = 0; i + 1 < context; i++) {
            const float *logits = llama_get_logits_ith(session, i);
            window_sum += negative_log_likelihood(logits, vocab_size, first[i + 1]);
        }
        sum += window_sum / (context - 1);
    }
    const double perplexity = std::exp(sum / windows);
    std::printf("{\"perplexity\": %.6f, \"text_tokens\": %zu}\n", perplexity, tokens.size());
}
