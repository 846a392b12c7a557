// Every kernel, in the order of a forward pass: what scripts/cuda-ptx compiles to kernels.ptx, and
// the emulator runs.

#include "embed.cu"
#include "norm.cu"
#include "matvec.cu"
#include "matvec_raw.cu"
#include "experts.cu"
#include "matmul.cu"
#include "rope.cu"
#include "attention_decode.cu"
#include "attention_prefill.cu"
#include "activate.cu"
#include "finish_logits.cu"
#include "top_k.cu"
#include "gemm.cu"
