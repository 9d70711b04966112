// Formation's signed values and frames, written from schemas/ alone: README.md and core.cddl, state.cddl, p2p.cddl.

import crypto from 'node:crypto'
import { base58btc } from 'multiformats/bases/base58'
import { decode, encode } from './cbor.mjs'

export const LINK = '/formation/link/1'
export const SYNC = '/formation/sync/1'
export const INTENT = '/formation/intent/1'
// The first 4 bytes of the network's id keep the tables of networks apart.
export const kadOf = networkId => `/formation/${networkId.slice(0, 8)}/kad/1.0.0`
// Between nodes a frame has 4 bytes of length; none is longer than this.
export const FRAME_SIZE_MAX = 320 * 1024
export const BLOCK_FRAME = 1
export const ACK_FRAME = 2
const LANE_SIZE = 42
const HASH_SIZE = 32
const ZERO_HASH = new Uint8Array(HASH_SIZE)
const TOPICS = ['node', 'account', 'image', 'vm', 'net', 'value', 'claim', 'committee']

export const hex = bytes => Buffer.from(bytes).toString('hex')
export const unhex = digits => new Uint8Array(Buffer.from(digits, 'hex'))
export const sha256 = bytes => new Uint8Array(crypto.createHash('sha256').update(bytes).digest())
const equal = (a, b) => Buffer.compare(a, b) === 0
const isBytes = (value, size) => value instanceof Uint8Array && value.length === size
const isCount = (value, least) =>
  (typeof value === 'bigint' || Number.isSafeInteger(value)) && value >= least && value < 1n << 63n

function check (holds, what) { if (!holds) throw new Error(what) }

// ── Ed25519 as schemas/README.md ("Signatures") wants it ──

const PKCS8 = unhex('302e020100300506032b657004220420')
const SPKI = unhex('302a300506032b6570032100')
const P = (1n << 255n) - 19n

const little = bytes => BigInt('0x' + (hex(Uint8Array.from(bytes).reverse()) || '0'))
function power (base, exponent) {
  let result = 1n
  for (base %= P; exponent > 0n; exponent >>= 1n, base = base * base % P) if (exponent & 1n) result = result * base % P
  return result
}
// y coordinates of the points of small order: of order 1, 2 and 4 they are 1, -1 and 0. One of order 8 doubles to one with
// y = 0, that is x² = -y²; in -x² + y² = 1 + dx²y² this is dy⁴ + 2y² - 1 = 0, so y² = (-1 ± √(1 + d)) / d.
const D = P - 121665n * power(121666n, P - 2n) % P
function root (square) {
  let r = power(square, (P + 3n) / 8n)
  if (r * r % P !== square % P) r = r * power(2n, (P - 1n) / 4n) % P
  return r * r % P === square % P ? r : null
}
const small = new Set([0n, 1n, P - 1n])
for (const sign of [1n, P - 1n]) {
  const y = root((P - 1n + sign * root(1n + D)) % P * power(D, P - 2n) % P)
  if (y !== null) small.add(y).add(P - y)
}
const hasSmallOrder = point => small.has((little(point) & ((1n << 255n) - 1n)) % P)
const isCanonical = point => (little(point) & ((1n << 255n) - 1n)) < P

export function verifyEd25519 (publicKey, message, signature) {
  if (!isBytes(publicKey, 32) || !isBytes(signature, 64)) return false
  // OpenSSL refuses S ≥ L and compares without the cofactor, as is wanted; it does not look at small orders.
  if (!isCanonical(publicKey) || hasSmallOrder(publicKey) || hasSmallOrder(signature.subarray(0, 32))) return false
  try {
    const key = crypto.createPublicKey({ key: Buffer.concat([SPKI, publicKey]), format: 'der', type: 'spki' })
    return crypto.verify(null, message, key, signature)
  } catch {
    return false
  }
}

export class Key {
  constructor (seed) {
    this.secret = crypto.createPrivateKey({ key: Buffer.concat([PKCS8, seed]), format: 'der', type: 'pkcs8' })
    this.public = new Uint8Array(crypto.createPublicKey(this.secret).export({ format: 'der', type: 'spki' })).subarray(-32)
  }

  sign (message) { return new Uint8Array(crypto.sign(null, message, this.secret)) }
}

export const accountId = publicKey => 'did:key:' + base58btc.encode(Buffer.concat([Buffer.of(0xed, 0x01), publicKey]))

// ── COSE_Sign1 ──

const PROTECTED = unhex('a10127')
// A tag (18) and an array of four: the one form that there is, hence without a decoder for tags.
const COSE_HEAD = unhex('d28443a10127a0')

function signedBytes (context, networkId, epoch, payload) {
  const aad = encode(epoch === null ? [context, networkId] : [context, networkId, epoch])
  return encode(['Signature1', PROTECTED, aad, payload])
}

export function sign (key, context, networkId, payload, epoch = null) {
  const signature = key.sign(signedBytes(context, networkId, epoch, payload))
  return new Uint8Array(Buffer.concat([COSE_HEAD, encode(payload), encode(signature)]))
}

export function parseSigned (raw) {
  check(equal(raw.subarray(0, COSE_HEAD.length), COSE_HEAD), 'not a COSE_Sign1 of this network')
  const rest = raw.subarray(COSE_HEAD.length)
  const [payload, signature] = decode(Buffer.concat([Buffer.of(0x82), rest]))
  check(payload instanceof Uint8Array && isBytes(signature, 64), 'COSE_Sign1: payload or signature')
  return { payload, signature }
}

const holds = (publicKey, context, networkId, signed, epoch = null) =>
  verifyEd25519(publicKey, signedBytes(context, networkId, epoch, signed.payload), signed.signature)

// ── blocks and acks (state.cddl) ──

function checkHead (head) {
  check(Array.isArray(head) && head.length === 3, 'head: not an array of three')
  check(isBytes(head[0], LANE_SIZE) && isCount(head[1], 1) && isBytes(head[2], HASH_SIZE), 'head: a field')
}

export function verifyBlock (raw, networkId) {
  const signed = parseSigned(raw)
  const block = decode(signed.payload)
  check(Array.isArray(block) && block.length === 8, 'block: not an array of eight')
  const [lane, seq, prev, hlc, ref, deps, kind, ops] = block
  checkHead([lane, seq, prev])
  check((seq === 1) === equal(prev, ZERO_HASH), 'block: prev')
  check(BigInt(hlc) >= new DataView(lane.buffer, lane.byteOffset + 32).getBigUint64(0), 'block: older than its lane')
  check(Array.isArray(ref) && ref.length === 2 && isCount(ref[0], 0) && isBytes(ref[1], HASH_SIZE), 'block: spine_ref')
  check(ref[0] !== 0 || equal(ref[1], networkId), 'block: of another network')
  check(Array.isArray(deps), 'block: deps')
  deps.forEach(checkHead)
  check(TOPICS.includes(kind), 'block: kind')
  check(Array.isArray(ops) && ops.length >= 1 && ops.length <= 1024, 'block: ops')
  check(holds(lane.subarray(0, 32), 'block', networkId, signed), 'block: the signature does not hold')
  return { lane, seq, prev, hlc, kind, ops, hash: sha256(raw) }
}

export function verifyAck (raw, networkId, voters) {
  const signed = parseSigned(raw)
  const ack = decode(signed.payload)
  check(Array.isArray(ack) && ack.length === 4, 'ack: not an array of four')
  const [epoch, voter, n, heads] = ack
  check(isCount(epoch, 0) && isCount(voter, 0) && isCount(n, 1) && Array.isArray(heads) && heads.length >= 1, 'ack: a field')
  heads.forEach(checkHead)
  check(voters[voter] !== undefined, 'ack: no such voter')
  check(holds(voters[voter], 'ack', networkId, signed, epoch), 'ack: the signature does not hold')
  return { epoch, voter, heads }
}

export const hlcNow = () => BigInt(Date.now()) << 16n

// A lane of our own: a chain of blocks of this process.
export class Lane {
  constructor (key, networkId) {
    const incarnation = Buffer.alloc(10)
    incarnation.writeBigUInt64BE(hlcNow())
    crypto.randomFillSync(incarnation, 8)
    this.key = key
    this.networkId = networkId
    this.id = new Uint8Array(Buffer.concat([key.public, incarnation]))
    this.seq = 0
    this.head = ZERO_HASH
    this.hlc = 0n
  }

  append (kind, ops) {
    const now = hlcNow()
    this.hlc = now > this.hlc ? now : this.hlc + 1n
    const block = [this.id, this.seq + 1, this.head, this.hlc, [0, this.networkId], [], kind, ops]
    const raw = sign(this.key, 'block', this.networkId, encode(block))
    this.seq += 1
    this.head = sha256(raw)
    return raw
  }
}

// A signed account_intent (core.cddl).
export function makeIntent (key, networkId, verb, objectId, body) {
  const now = Date.now()
  const nonce = new Uint8Array(crypto.randomBytes(16))
  const intent = [key.public, verb, objectId, encode(body), nonce, now, now + 600000, key.public]
  return sign(key, 'intent', networkId, encode(intent))
}

// ── frames (p2p.cddl, state.cddl) ──

export function frame (payload) {
  const out = Buffer.alloc(4 + payload.length)
  out.writeUInt32BE(payload.length)
  out.set(payload, 4)
  return new Uint8Array(out)
}

export function * cutFrames (state, data) {
  state.rest = Buffer.concat([state.rest ?? Buffer.alloc(0), data])
  while (state.rest.length >= 4) {
    const size = state.rest.readUInt32BE()
    check(size <= FRAME_SIZE_MAX, `a frame of ${size} bytes`)
    if (state.rest.length < 4 + size) return
    yield new Uint8Array(state.rest.subarray(4, 4 + size))
    state.rest = state.rest.subarray(4 + size)
  }
}

// ── evidence for people: what schemas/README.md says of "An op file" ──

// Reads one head and byte string of a CBOR sequence of byte strings; each holds one value.
function splitSequence (data) {
  const parts = []
  for (let start = 0; start < data.length;) {
    const low = data[start] & 31
    check(data[start] >> 5 === 2 && low < 28, 'file: not a sequence of byte strings')
    const headSize = low < 24 ? 1 : 1 + 2 ** (low - 24)
    let size = low
    if (low >= 24) { size = 0; for (let i = 1; i < headSize; i++) size = size * 256 + data[start + i] }
    const end = start + headSize + size
    check(end <= data.length, 'file: cut off')
    parts.push(decode(data.subarray(start, end)))
    start = end
  }
  return parts
}

const quorumSize = voters => 2 * Math.floor((voters.length - 1) / 3) + 1

// A final_chain of the committee of one epoch: its first proposal, which 2f+1 of these voters made final.
function verifyFinalChain (raw, networkId, voters, epoch) {
  const [below, certificate] = decode(raw)
  const [last, signedVotes] = decode(certificate)
  const chain = [...below, last].map(led => {
    const [content] = decode(led)
    const [of, view, height, parent, , cut, closes, checkpoint, handover] = decode(content)
    check(of === epoch, 'final chain: another epoch')
    return { view, height, parent, cut, closes, checkpoint, handover, hash: sha256(led) }
  })
  for (let i = 1; i < chain.length; i++) {
    const [before, after] = [chain[i - 1], chain[i]]
    const follows = after.height === before.height + 1 && after.view > before.view
    check(follows && equal(after.parent, before.hash), 'final chain: not a chain')
  }
  const top = chain.at(-1), signers = new Set()
  for (const rawVote of signedVotes) {
    const signed = parseSigned(rawVote)
    const [of, view, voter, hash] = decode(signed.payload)
    check(of === epoch && view === top.view && equal(hash, top.hash), 'final chain: a vote for something else')
    const isSigned = voters[voter] !== undefined && holds(voters[voter], 'finalize', networkId, signed, epoch)
    check(isSigned, 'final chain: a vote that its voter did not sign')
    signers.add(voter)
  }
  check(signers.size >= quorumSize(voters), 'final chain: no quorum')
  return chain[0]
}

export function verifyOpFile (data, networkId) {
  const [format, originRaw, linksRaw, bundleRaw, ...rest] = splitSequence(data)
  check(rest.length === 0 && bundleRaw !== undefined, 'file: not four parts')
  check(equal(format, encode(['formation-op', 1])), 'file: not an op file')
  const [genesis, signatures] = decode(originRaw)
  // There is one encoding of a value, so this is what stands there.
  const genesisRaw = encode(genesis)
  check(equal(sha256(genesisRaw), networkId), 'file: of another network')
  const committees = [genesis[3].map(founder => founder[1])]
  for (const key of committees[0]) {
    const mine = signatures.find(([signer]) => equal(signer, key))
    const message = signedBytes('manifest', networkId, null, genesisRaw)
    check(mine && verifyEd25519(key, message, mine[1]), 'file: a founder did not sign')
  }
  for (const link of decode(linksRaw)) {
    const epoch = committees.length - 1
    const { handover } = verifyFinalChain(link, networkId, committees[epoch], epoch)
    const [, , , [next, voters]] = decode(handover)
    check(next === epoch + 1, 'link: another epoch')
    committees.push(voters)
  }
  const [lane, seq, index, blocks, acks, finalRaw] = decode(bundleRaw)
  const chain = blocks.map(raw => verifyBlock(raw, networkId))
  chain.forEach((block, i) => {
    check(equal(block.lane, lane) && block.seq === seq + i, 'blocks: another lane or number')
    check(i === 0 || equal(block.prev, chain[i - 1].hash), 'blocks: not a chain')
  })
  const names = heads => heads.some(([of, at, hash]) => equal(of, lane) && chain[at - seq] && equal(chain[at - seq].hash, hash))
  const signers = new Set(), epochs = new Set()
  for (const raw of acks) {
    const ack = verifyAck(raw, networkId, committees[decode(parseSigned(raw).payload)[0]] ?? [])
    epochs.add(ack.epoch)
    check(names(ack.heads), 'acks: of other blocks')
    signers.add(ack.voter)
  }
  if (acks.length) {
    const [epoch, ...others] = epochs
    check(others.length === 0 && signers.size >= quorumSize(committees[epoch]), 'acks: no quorum of one epoch')
  }
  let height = null
  if (finalRaw.length) {
    const [, certificate] = decode(finalRaw)
    const [content] = decode(decode(certificate)[0])
    const [epoch] = decode(content)
    const first = verifyFinalChain(finalRaw, networkId, committees[epoch] ?? [], epoch)
    const plan = first.handover === null ? [] : decode(first.handover)
    check(names([...first.cut, ...first.closes, ...(plan[1] ?? []), ...(plan[2] ?? [])]), 'final: of other blocks')
    height = first.height
  }
  return { verb: chain[0].ops[index][1], objectId: chain[0].ops[index][2], signers: signers.size, height }
}
