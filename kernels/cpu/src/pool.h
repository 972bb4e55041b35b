// Threads that outlive a call. A thread that has just been created shares its parent's core until
// the scheduler balances the load, which on a busy machine takes longer than a short attention.

#ifndef PISA_POOL_H
#define PISA_POOL_H

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>

namespace pisa {

class Pool {
 public:
  // The pool of this process; a forked child gets a new one, since it inherits no threads.
  static Pool& instance();

  // Calls body(argument) on this thread and on up to threads - 1 others, as far as those come to
  // begin before this one returns from it. So a single call must be able to do everything.
  void run(int64_t threads, void (*body)(void*), void* argument);

 private:
  struct Job {
    void (*body)(void*);
    void* argument;
    int64_t wanted, running;  // threads that may still begin, threads that have begun
  };

  void grow(int64_t workers);
  void serve();

  std::mutex mutex;
  std::condition_variable wake, ended;
  std::deque<Job*> jobs;
  int64_t workers = 0;
};

}  // namespace pisa

#endif  // PISA_POOL_H
