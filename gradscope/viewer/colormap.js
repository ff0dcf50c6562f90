// Viridis: readable with any colour vision, and still in order in grey.

// 64 of its colours, RRGGBB each; van der Walt and Smith 2015, CC0.
const ANCHORS =
  "44015446075a470d6047136548186a481d6f482374482878472d7b46327e453781443b844240864045883e49893d4e8a" +
  "3a538b38588c365c8d34608d32648e31688e2f6c8e2d708e2c738e2a778e297b8e277f8e26828e24868e238a8d218e8d" +
  "20928c1f968b1f9a8a1f9e891fa18721a58523a98326ad812ab07f2fb47c35b7793bbb7542be714ac16d52c5695ac864" +
  "65cb5e6ece5877d15381d34d8bd64695d840a0da39aadc32b5de2bc0df25cae11fd5e21adfe318eae51af4e61efde725";

const SIZE = 256;

function build() {
  const colors = new Uint8Array(3 * SIZE);
  const last = ANCHORS.length / 6 - 1;
  const channel = (anchor, index) => parseInt(ANCHORS.slice(6 * anchor + 2 * index, 6 * anchor + 2 * index + 2), 16);
  for (let entry = 0; entry < SIZE; entry++) {
    const place = (entry / (SIZE - 1)) * last;
    const below = Math.min(Math.floor(place), last - 1);
    for (let index = 0; index < 3; index++) {
      const [low, high] = [channel(below, index), channel(below + 1, index)];
      colors[3 * entry + index] = Math.round(low + (place - below) * (high - low));
    }
  }
  return colors;
}

const COLORS = build();

/** Where the colour of a share from 0 to 1 stands in `COLORS`. */
export function colorAt(share) {
  return 3 * Math.max(0, Math.min(SIZE - 1, Math.round(share * (SIZE - 1))));
}

/** The colour of a share from 0 to 1 for CSS. */
export function color(share) {
  const at = colorAt(share);
  return `rgb(${COLORS[at]} ${COLORS[at + 1]} ${COLORS[at + 2]})`;
}

export { COLORS };
