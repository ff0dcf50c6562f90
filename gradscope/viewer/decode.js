// From what is embedded in a page or sent by a server back to arrays.

/** The bytes of base64 text that was compressed with zlib. */
async function inflate(text) {
  const chars = atob(text);
  const packed = new Uint8Array(chars.length);
  for (let at = 0; at < chars.length; at++) packed[at] = chars.charCodeAt(at);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/**
 * Numbers of 11 significant bits, as half precision has, with the exponent of single precision:
 * three planes of bytes (exponent; 8 bits of the fraction; 2 more bits and the sign).
 */
export async function numbers(text) {
  const bytes = await inflate(text);
  const size = bytes.length / 3;
  const bits = new Uint32Array(size);
  for (let at = 0; at < size; at++) {
    const rest = bytes[2 * size + at];
    bits[at] = ((rest & 1) << 31) | (bytes[at] << 23) | (bytes[size + at] << 15) | ((rest >> 1) << 13);
  }
  return new Float32Array(bits.buffer);
}

/** Small whole numbers. */
export const counts = inflate;
