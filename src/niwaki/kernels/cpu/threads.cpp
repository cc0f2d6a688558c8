// Division of rows over threads. PyTorch's OpenMP threads spin for a while after its own loops, and other threads would
// wait for them. So the loop runs on the OpenMP threads, which it finds in the process at run time. Plain threads serve
// without OpenMP, and after a fork, which OpenMP threads do not survive.

#include "kernels.h"

#include <thread>

#if defined(__linux__)
#include <dlfcn.h>
#include <unistd.h>
#endif

namespace niwaki {
namespace {

struct Shared {
    int64_t rows, share;
    const std::function<void(int64_t, int64_t)>* work;
};

#if defined(__linux__)
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();

ThreadNumber thread_number = nullptr;

void run_share(void* data) {
    const Shared& shared = *static_cast<Shared*>(data);
    const int64_t first = thread_number() * shared.share;
    if (first < shared.rows) (*shared.work)(first, std::min(first + shared.share, shared.rows));
}

Parallel find_openmp() {
    thread_number = reinterpret_cast<ThreadNumber>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return thread_number ? parallel : nullptr;
}

const pid_t loaded_by = getpid();
#endif

}  // namespace

void over_rows(int64_t rows, int threads, const std::function<void(int64_t, int64_t)>& work) {
    const int64_t share = (rows + threads - 1) / std::max(threads, 1);
    if (threads <= 1 || share >= rows) return work(0, rows);
#if defined(__linux__)
    static const Parallel parallel = find_openmp();
    if (parallel && getpid() == loaded_by) {
        Shared shared{rows, share, &work};
        return parallel(run_share, &shared, static_cast<unsigned>(threads), 0);
    }
#endif
    std::vector<std::thread> others;
    for (int64_t first = share; first < rows; first += share)
        others.emplace_back(work, first, std::min(rows, first + share));
    work(0, share);
    for (std::thread& other : others) other.join();
}

}  // namespace niwaki
