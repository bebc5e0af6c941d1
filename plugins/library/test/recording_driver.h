#pragma once

// What the recording driver offers beside the functions of the CUDA driver, for dlsym.

/// Makes the calling process see a device of this compute capability, e.g. 80, with a current context; 0: no context.
using SetCapability = void (*)(int capability);

/// Launches since the last call, one line each: symbol, grid, threads, shared bytes, stream, then name=value.
using TakeLaunches = const char* (*)();

/// Cubins loaded since the process started.
using CountLoads = int (*)();
