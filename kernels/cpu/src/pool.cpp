#include "pool.h"

#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <thread>

namespace pisa {

Pool& Pool::instance() {
  static std::mutex guard;
  static Pool* pool = nullptr;
  static pid_t owner = 0;
  const std::lock_guard<std::mutex> lock(guard);
  // Never deleted: its threads wait on it until the process ends.
  if (!pool || owner != getpid()) {
    pool = new Pool;
    owner = getpid();
  }
  return *pool;
}

void Pool::grow(int64_t count) {
  try {
    for (; workers < count; ++workers) std::thread(&Pool::serve, this).detach();
  } catch (const std::system_error&) {
    // No more threads to be had: the ones there are, if only the caller, do all the work.
  }
}

void Pool::serve() {
  std::unique_lock<std::mutex> lock(mutex);
  for (;;) {
    wake.wait(lock, [this] { return !jobs.empty(); });
    Job* job = jobs.front();
    if (--job->wanted == 0) jobs.pop_front();
    ++job->running;
    lock.unlock();
    job->body(job->argument);
    lock.lock();
    if (--job->running == 0) ended.notify_all();
  }
}

void Pool::run(int64_t threads, void (*body)(void*), void* argument) {
  Job job{body, argument, threads - 1, 0};
  std::unique_lock<std::mutex> lock(mutex);
  grow(job.wanted);
  jobs.push_back(&job);
  for (int64_t i = 1; i < threads; ++i) wake.notify_one();
  lock.unlock();
  body(argument);
  lock.lock();
  const auto waiting = std::find(jobs.begin(), jobs.end(), &job);
  if (waiting != jobs.end()) jobs.erase(waiting);
  ended.wait(lock, [&job] { return job.running == 0; });
}

}  // namespace pisa
