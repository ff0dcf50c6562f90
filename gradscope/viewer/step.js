// One step that several pictures look at together.

/** A step that pictures share; `subscribe` calls back with each new one. */
export function sharedStep() {
  const listeners = new Set();
  let current = null;
  return {
    get value() {
      return current;
    },
    set(step) {
      if (step === current) return;
      current = step;
      listeners.forEach((listener) => listener(step));
    },
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

/** The index of the step nearest to the wanted one, in an ascending array; of an empty one 0. */
export function nearest(steps, wanted) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - steps[low - 1] <= steps[low] - wanted ? low - 1 : low;
}
