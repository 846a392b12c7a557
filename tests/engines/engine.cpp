// What llama.cpp makes of a GGUF model, as one JSON object. No token is put in front of a text.
//
// engine perplexity MODEL.gguf TEXT CONTEXT WINDOWS
//     By the protocol of `slimllm eval`: windows of the file TEXT, which is tokenized whole, that
//     do not overlap; of each the mean negative log-likelihood of all tokens but the first.
// engine continue MODEL.gguf PROMPT COUNT
//     The likeliest COUNT tokens, one by one, or fewer if an end token comes: ids of the prompt and
//     of the tokens, and the text of each, with one character for each byte.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "llama.h"

static void fail(const char *what) {
    std::fprintf(stderr, "error: %s\n", what);
    std::exit(2);
}

struct Engine {
    llama_model *model;
    const llama_vocab *vocab;
    int vocab_size;
    llama_context *session = nullptr;
    llama_batch batch;

    explicit Engine(const char *path) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        llama_backend_init();
        model = llama_model_load_from_file(path, llama_model_default_params());
        if (!model) fail("llama.cpp cannot load the model");
        vocab = llama_model_get_vocab(model);
        vocab_size = llama_vocab_n_tokens(vocab);
    }

    void start(int context) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = params.n_batch = context;
        session = llama_init_from_model(model, params);
        if (!session) fail("llama.cpp cannot make a context");
        batch = llama_batch_init(context, 0, 1);
    }

    // Tokens that stand at `position` and behind it; afterwards there are the logits of each.
    void feed(const llama_token *tokens, int count, int position) {
        batch.n_tokens = count;
        for (int i = 0; i < count; i++) {
            batch.token[i] = tokens[i];
            batch.pos[i] = position + i;
            batch.n_seq_id[i] = 1;
            batch.seq_id[i][0] = 0;
            batch.logits[i] = true;
        }
        if (llama_decode(session, batch) != 0) fail("llama.cpp cannot run the model");
    }

    std::vector<llama_token> tokenize(const std::string &text) const {
        std::vector<llama_token> tokens(text.size() + 8);
        const bool add_special = false, parse_special = true;
        const int count = llama_tokenize(vocab, text.data(), text.size(), tokens.data(),
                                         tokens.size(), add_special, parse_special);
        if (count < 0) fail("the text has more tokens than bytes");
        tokens.resize(count);
        return tokens;
    }

    std::string text_of(llama_token token) const {
        char text[1024];
        const int length = llama_token_to_piece(vocab, token, text, sizeof text, 0, true);
        if (length < 0) fail("a token has a long text");
        return std::string(text, length);
    }
};

static double negative_log_likelihood(const float *logits, int vocab_size, llama_token token) {
    const double largest = *std::max_element(logits, logits + vocab_size);
    double sum = 0;
    for (int i = 0; i < vocab_size; i++) sum += std::exp(logits[i] - largest);
    return std::log(sum) + largest - logits[token];
}

static void perplexity(Engine &engine, const char *path, int context, int windows) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    const std::vector<llama_token> tokens = engine.tokenize(text.str());
    if ((size_t)context * windows > tokens.size()) fail("the text is too short");
    engine.start(context);
    double sum = 0;
    for (int window = 0; window < windows; window++) {
        const llama_token *first = tokens.data() + (size_t)window * context;
        llama_memory_clear(llama_get_memory(engine.session), true);
        engine.feed(first, context, 0);
        double window_sum = 0;
        for (int i = 0; i + 1 < context; i++) {
            const float *logits = llama_get_logits_ith(engine.session, i);
            window_sum += negative_log_likelihood(logits, engine.vocab_size, first[i + 1]);
        }
        sum += window_sum / (context - 1);
    }
    const double perplexity = std::exp(sum / windows);
    std::printf("{\"perplexity\": %.6f, \"text_tokens\": %zu}\n", perplexity, tokens.size());
}

static void continue_text(Engine &engine, const char *prompt, int count) {
    std::vector<llama_token> tokens = engine.tokenize(prompt);
    const size_t prompt_tokens = tokens.size();
    if (prompt_tokens == 0) fail("the prompt is empty");
    engine.start(prompt_tokens + count);
    size_t fed = 0;
    while (tokens.size() < prompt_tokens + count) {
        engine.feed(tokens.data() + fed, tokens.size() - fed, fed);
        fed = tokens.size();
        const float *logits = llama_get_logits_ith(engine.session, -1);
        const llama_token best = std::max_element(logits, logits + engine.vocab_size) - logits;
        if (llama_vocab_is_eog(engine.vocab, best)) break;
        tokens.push_back(best);
    }
    const auto print_ids = [&](size_t from, size_t to) {
        for (size_t i = from; i < to; i++) std::printf(i > from ? ", %d" : "%d", tokens[i]);
    };
    std::printf("{\"prompt\": [");
    print_ids(0, prompt_tokens);
    std::printf("], \"tokens\": [");
    print_ids(prompt_tokens, tokens.size());
    std::printf("], \"texts\": [");
    for (size_t i = prompt_tokens; i < tokens.size(); i++) {
        std::printf(i > prompt_tokens ? ", \"" : "\"");
        for (unsigned char byte : engine.text_of(tokens[i])) std::printf("\\u%04x", byte);
        std::printf("\"");
    }
    std::printf("]}\n");
}

int main(int argc, char **argv) {
    const auto asks_for = [&](const char *mode, int arguments) {
        return argc == arguments + 1 && std::strcmp(argv[1], mode) == 0;
    };
    if (asks_for("perplexity", 5)) {
        Engine engine(argv[2]);
        perplexity(engine, argv[3], std::atoi(argv[4]), std::atoi(argv[5]));
    } else if (asks_for("continue", 4)) {
        Engine engine(argv[2]);
        continue_text(engine, argv[3], std::atoi(argv[4]));
    } else {
        fail("expected `perplexity MODEL TEXT CONTEXT WINDOWS` or `continue MODEL PROMPT COUNT`");
    }
}
