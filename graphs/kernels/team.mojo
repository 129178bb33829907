"""Work that several threads share, in phases of one parallel region.

A thread goes on to the next phase when all of the present one is done, and takes
another's work when it has none left. One thread alone does everything: none needs
another to be running, so that nothing hangs on a busy machine.
"""
from std.atomic import Atomic
from std.ffi import external_call
from std.memory.alloc import unsafe_alloc
from std.sys import CompilationTarget, llvm_intrinsic
from max.algorithm import sync_parallelize
from max.runtime.asyncrt import parallelism_level

# Counters lie a cache line apart.
comptime APART = 8
# Looks at a counter before a waiting thread leaves its core to others for a moment: what
# it waits for may be a thread that has none. Some tens of microseconds.
comptime PATIENCE = 1024


@always_inline
def pause(times: Int):
    """One look of a loop that waits, after that many before."""
    comptime if CompilationTarget.is_x86():
        llvm_intrinsic["llvm.x86.sse2.pause", NoneType]()
    if times % PATIENCE == PATIENCE - 1:
        _ = external_call["sched_yield", Int32]()


@always_inline
def team_size(is_parallel: Bool) -> Int:
    """How many threads a region has."""
    return max(1, parallelism_level(None)) if is_parallel else 1


@fieldwise_init
struct Team(Copyable, ImplicitlyCopyable, Movable):
    """The threads of a region, and how far each phase is."""

    var counters: Pointer[Scalar[DType.int64], MutUntrackedOrigin]
    var size: Int
    var phases: Int

    def share[
        Work: def(Int, Int) -> None
    ](self, me: Int, phase: Int, units: Int, most: Int, work: Work):
        """Calls work(first, stop) for parts of 0 .. units.

        A part is half of what is left of a thread's share, and at most `most` units.
        Returns when all units are done; of the last phase, when none is left to take.
        """
        var base = self.counters.unsafe_offset(phase * (self.size + 1) * APART)
        var done = base.unsafe_offset(self.size * APART)
        for turn in range(self.size):
            var whose = (me + turn) % self.size
            var first = whose * units // self.size
            var stop = (whose + 1) * units // self.size
            var counter = base.unsafe_offset(whose * APART)
            while True:
                var left = stop - first - Int(Atomic.load(counter))
                if left <= 0:
                    break
                var part = max(1, min(left // 2, most))
                var at = first + Int(Atomic.fetch_add(counter, Int64(part)))
                if at >= stop:
                    break
                var end = min(at + part, stop)
                work(at, end)
                _ = Atomic.fetch_add(done, Int64(end - at))
        if phase + 1 < self.phases:
            var times = 0
            while Int(Atomic.load(done)) < units:
                pause(times)
                times += 1


def run_team[
    Body: def(Team, Int) -> None
](phases: Int, is_parallel: Bool, body: Body) raises:
    """Calls body(team, me) on every thread, or on this one only."""
    var size = team_size(is_parallel)
    var count = phases * (size + 1) * APART
    var counters = unsafe_alloc[Scalar[DType.int64]](count, alignment=64)
    for i in range(count):
        counters.unsafe_offset(i).unsafe_store(Int64(0))
    var team = Team(counters, size, phases)

    def task(me: Int) {imm}:
        body(team, me)

    if size == 1:
        task(0)
    else:
        sync_parallelize(task, size)
    counters.unsafe_free()
