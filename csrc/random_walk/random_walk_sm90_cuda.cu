// random_walk on NVIDIA GPUs of compute capability 9.0.
#include "common/sm90_launch.h"
#include "random_walk/random_walk_sm90.h"
#include "random_walk/random_walk_sm90_launch.h"

namespace random_walk::sm90 {

template <class T>
bool can_run_step(const Step<T>& step) {
  return takes(step.problem, step.q, step.k, step.x, step.start);
}
template <class T>
bool can_run_transposed(const Step<T>& step) {
  return can_run_step(step);
}
template <class T>
bool can_run_scores(const Scores<T>& all) {
  return takes(all.problem, all.q, all.k, all.g, all.x);
}

template <class T>
void run_step(const Step<T>& step, cudaStream_t stream) {
  run_walk<false>(HopperLauncher(stream), step);
}
template <class T>
void run_transposed(const Step<T>& step, cudaStream_t stream) {
  run_walk<true>(HopperLauncher(stream), step);
}
template <class T>
void run_scores(const Scores<T>& all, cudaStream_t stream) {
  run_gradients(HopperLauncher(stream), all);
}

#define CC4S_INSTANCES(T)                                      \
  template bool can_run_step(const Step<T>&);                  \
  template bool can_run_transposed(const Step<T>&);            \
  template bool can_run_scores(const Scores<T>&);              \
  template void run_step(const Step<T>&, cudaStream_t);        \
  template void run_transposed(const Step<T>&, cudaStream_t);  \
  template void run_scores(const Scores<T>&, cudaStream_t);
CC4S_INSTANCES(BFloat16)
CC4S_INSTANCES(Half)
#undef CC4S_INSTANCES

}  // namespace random_walk::sm90
