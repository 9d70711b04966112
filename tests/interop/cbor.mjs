// Deterministic CBOR as schemas/README.md ("Encoding") wants it: one encoding for each value; the decoder refuses all others.
// Values: null, boolean, integer (number where it is exact, else BigInt), Uint8Array, string, array, Map with text keys.

const LEVEL_COUNT_MAX = 16
const text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })
const { compare, concat } = Buffer

export function encode (value) {
  const parts = []
  put(value, parts, 0)
  return new Uint8Array(concat(parts))
}

function head (major, count) {
  const n = BigInt(count)
  const size = n < 24n ? 0 : n < 1n << 8n ? 1 : n < 1n << 16n ? 2 : n < 1n << 32n ? 4 : 8
  if (n >= 1n << 64n) throw new RangeError('an integer of more than 64 bits')
  const out = Buffer.alloc(1 + size)
  out[0] = (major << 5) | (size === 0 ? Number(n) : 23 + [1, 2, 4, 8].indexOf(size) + 1)
  for (let i = size, rest = n; i > 0; i--, rest >>= 8n) out[i] = Number(rest & 0xffn)
  return out
}

function put (value, parts, level) {
  if (level > LEVEL_COUNT_MAX) throw new RangeError(`more than ${LEVEL_COUNT_MAX} levels`)
  if (value === null) parts.push(Buffer.of(0xf6))
  else if (value === false || value === true) parts.push(Buffer.of(value ? 0xf5 : 0xf4))
  else if (typeof value === 'bigint' || Number.isSafeInteger(value)) {
    parts.push(value < 0 ? head(1, -1n - BigInt(value)) : head(0, value))
  }
  else if (typeof value === 'string') { const raw = Buffer.from(value); parts.push(head(3, raw.length), raw) }
  else if (value instanceof Uint8Array) parts.push(head(2, value.length), value)
  else if (Array.isArray(value)) { parts.push(head(4, value.length)); for (const item of value) put(item, parts, level + 1) }
  else if (value instanceof Map) {
    // Length-first: keys are text, so the order of their encodings is that of their lengths, then of their bytes.
    const rows = [...value].map(([key, item]) => [Buffer.from(encode(key)), item])
    rows.sort(([a], [b]) => a.length - b.length || compare(a, b))
    parts.push(head(5, rows.length))
    for (const [key, item] of rows) { parts.push(key); put(item, parts, level + 1) }
  } else throw new TypeError(`no CBOR for ${typeof value}`)
}

export function decode (data) {
  const at = { data: Buffer.from(data.buffer, data.byteOffset, data.byteLength), start: 0 }
  const value = take(at, 0)
  if (at.start !== at.data.length) throw new Error('CBOR: bytes after the value')
  return value
}

function takeHead (at) {
  const first = at.data[at.start++]
  if (first === undefined) throw new Error('CBOR: cut off')
  const major = first >> 5, low = first & 31
  if (low < 24 || major === 7) return [major, low]
  const size = { 24: 1, 25: 2, 26: 4, 27: 8 }[low]
  if (size === undefined) throw new Error('CBOR: an indefinite length or a reserved head')
  if (at.start + size > at.data.length) throw new Error('CBOR: cut off')
  let n = 0n
  for (let i = 0; i < size; i++) n = (n << 8n) | BigInt(at.data[at.start++])
  if (n < (size === 1 ? 24n : 1n << BigInt(4 * size))) throw new Error('CBOR: a head that could be shorter')
  return [major, n <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(n) : n]
}

function takeBytes (at, count) {
  if (at.start + Number(count) > at.data.length) throw new Error('CBOR: cut off')
  return at.data.subarray(at.start, at.start += Number(count))
}

function take (at, level) {
  if (level > LEVEL_COUNT_MAX) throw new Error(`CBOR: more than ${LEVEL_COUNT_MAX} levels`)
  const [major, n] = takeHead(at)
  switch (major) {
    case 0: return n
    case 1: return typeof n === 'bigint' ? -1n - n : -1 - n
    case 2: return new Uint8Array(takeBytes(at, n))
    case 3: return text.decode(takeBytes(at, n))
    case 4: {
      const items = []
      for (let i = 0; i < n; i++) items.push(take(at, level + 1))
      return items
    }
    case 5: {
      const map = new Map()
      let before = null
      for (let i = 0; i < n; i++) {
        const start = at.start
        const key = take(at, level + 1)
        if (typeof key !== 'string') throw new Error('CBOR: a key that is no text')
        const raw = at.data.subarray(start, at.start)
        const order = before === null ? -1 : before.length - raw.length || compare(before, raw)
        if (order >= 0) throw new Error('CBOR: keys out of order')
        before = raw
        map.set(key, take(at, level + 1))
      }
      return map
    }
    case 6: throw new Error('CBOR: a tag')
  }
  if (n === 20 || n === 21) return n === 21
  if (n === 22) return null
  throw new Error('CBOR: a float or another simple value')
}
