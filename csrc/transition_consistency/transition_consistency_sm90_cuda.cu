// transition_consistency on NVIDIA GPUs of compute capability 9.0.
#include "common/sm90_launch.h"
#include "transition_consistency/transition_consistency_sm90.h"
#include "transition_consistency/transition_consistency_sm90_launch.h"

namespace transition_consistency::sm90 {

template <class T>
bool can_run_divergences(const Divergences<T>& all) {
  return takes(all.problem);
}
template <class T>
bool can_run_scores(const Scores<T>& all) {
  return takes(all.problem);
}

template <class T>
void run_divergences(const Divergences<T>& all, cudaStream_t stream) {
  run_rows(HopperLauncher(stream), all);
}
template <class T>
void run_scores(const Scores<T>& all, cudaStream_t stream) {
  run_gradients(HopperLauncher(stream), all);
}

#define CC4S_INSTANCES(T)                                             \
  template bool can_run_divergences(const Divergences<T>&);           \
  template bool can_run_scores(const Scores<T>&);                     \
  template void run_divergences(const Divergences<T>&, cudaStream_t); \
  template void run_scores(const Scores<T>&, cudaStream_t);
CC4S_INSTANCES(BFloat16)
CC4S_INSTANCES(Half)
#undef CC4S_INSTANCES

}  // namespace transition_consistency::sm90
