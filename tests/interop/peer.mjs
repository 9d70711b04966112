// A peer of a Formation network in another language: js-libp2p, and formation.mjs. For the tests beside it.
// Commands are JSON objects, one a line, on stdin; answers ({id, ok} or {id, error}) and the first word ({ready}) on stdout.

import './polyfill.mjs'
import crypto from 'node:crypto'
import fs from 'node:fs'
import readline from 'node:readline'
import { createLibp2p } from 'libp2p'
import { tcp } from '@libp2p/tcp'
import { noise } from '@libp2p/noise'
import { yamux } from '@libp2p/yamux'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { gossipsub, TopicValidatorResult } from '@libp2p/gossipsub'
import { kadDHT, passthroughMapper } from '@libp2p/kad-dht'
import { generateKeyPairFromSeed } from '@libp2p/crypto/keys'
import { multiaddr } from '@multiformats/multiaddr'
import { peerIdFromString } from '@libp2p/peer-id'
import * as cbor from './cbor.mjs'
import * as formation from './formation.mjs'

const { hex, unhex } = formation
const KEEP_ALIVE_MS = 2500
const MANY = { maxInboundStreams: 4096, maxOutboundStreams: 4096 }
const seed = unhex(process.argv[2])
const out = value => process.stdout.write(JSON.stringify(value) + '\n')
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms))

const node = await createLibp2p({
  privateKey: await generateKeyPairFromSeed('Ed25519', seed),
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  // By itself it takes 5 connections a second from one host, and dials no loopback address.
  connectionManager: { inboundConnectionThreshold: 1e6 },
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify(),
    ping: ping(),
    pubsub: gossipsub({ globalSignaturePolicy: 'StrictSign', allowPublishToZeroTopicPeers: true, emitSelf: false }),
    dht: kadDHT({ protocol: formation.KAD, clientMode: false, peerInfoMapper: passthroughMapper, allowQueryWithZeroPeers: true })
  }
})

// ── streams, for the muxer's tests ──

const pattern = (start, size) => {
  const data = new Uint8Array(size)
  for (let i = 0; i < size; i++) data[i] = (start + i) * 31 % 251
  return data
}

const sha = data => hex(formation.sha256(data))

async function send (stream, data) { if (!stream.send(data)) await stream.onDrain() }

// Sends `size` bytes of the pattern, then FIN; the digest of what comes back.
async function pour (stream, size, pieceSize) {
  const piece = pattern(0, 251 * Math.ceil(pieceSize / 251) + 251)
  for (let sent = 0; sent < size;) {
    const count = Math.min(pieceSize, size - sent)
    await send(stream, piece.slice(sent % 251, sent % 251 + count))
    sent += count
  }
  await stream.close()
}

async function drain (stream, pauseMs = 0) {
  const digest = crypto.createHash('sha256')
  let size = 0
  for await (const data of stream) {
    const bytes = data.subarray()
    digest.update(bytes)
    size += bytes.length
    if (pauseMs) await sleep(pauseMs)
  }
  return { size, digest: digest.digest('hex') }
}

const ended = { resets: 0, ends: 0 }
async function serve (protocol, handler) {
  await node.handle(protocol, async stream => {
    try { await handler(stream); ended.ends++ } catch (error) { ended.resets++; stream.abort(error) }
  }, MANY)
}

await serve('/interop/echo/1', async stream => {
  for await (const data of stream) await send(stream, data)
  await stream.close()
})
// Answers with the size and digest once the other side has said that it ends: a half-closed stream still carries that.
const sink = pauseMs => async stream => { const got = await drain(stream, pauseMs); await send(stream, Buffer.from(JSON.stringify(got))); await stream.close() }
await serve('/interop/sink/1', sink(0))
await serve('/interop/slow/1', sink(2))
await serve('/interop/source/1', async stream => {
  const asked = []
  for await (const data of stream) asked.push(data.subarray())
  await pour(stream, Number(Buffer.concat(asked).toString()), 65536)
})
await serve('/interop/reset/1', async stream => { await send(stream, Buffer.from('so far')); await sleep(50); throw new Error('enough') })

const open = (peer, protocol) => node.dialProtocol(peerIdFromString(peer), protocol, MANY)

const streams = {
  async echo ({ peer, size, piece }) {
    const stream = await open(peer, '/interop/echo/1')
    const [, got] = await Promise.all([pour(stream, size, piece), drain(stream)])
    return got
  },
  async sink ({ peer, size, piece, protocol }) {
    const stream = await open(peer, protocol ?? '/interop/sink/1')
    await pour(stream, size, piece)
    let answer = ''
    for await (const data of stream) answer += Buffer.from(data.subarray()).toString()
    return JSON.parse(answer)
  },
  async source ({ peer, size, pauseMs }) {
    const stream = await open(peer, '/interop/source/1')
    await send(stream, Buffer.from(String(size)))
    await stream.close()
    return await drain(stream, pauseMs ?? 0)
  },
  async many ({ peer, count, size }) {
    const one = async () => (await streams.echo({ peer, size, piece: size })).size
    return { sizes: await Promise.all(Array.from({ length: count }, one)) }
  },
  async reset ({ peer }) {
    // It may be reset before the negotiation has returned: then js calls that a bad state of the stream.
    try { return { end: await drain(await open(peer, '/interop/reset/1')) } } catch (error) { return { error: error.name } }
  },
  async abort ({ peer, count }) {
    for (let i = 0; i < count; i++) {
      const stream = await open(peer, '/interop/sink/1')
      await send(stream, pattern(0, 1000))
      stream.abort(new Error('changed my mind'))
    }
    return {}
  },
  // Opens more than the other side serves: some are reset.
  async tooMany ({ peer, count }) {
    const one = async () => { try { return (await streams.echo({ peer, size: 1000, piece: 1000 })).size === 1000 } catch { return false } }
    const held = await Promise.all(Array.from({ length: count }, one))
    return { served: held.filter(Boolean).length }
  },
  // A life of many streams, some at a time: whole ones, ones broken off while sending or reading, ones that the other side resets.
  async life ({ peer, randomSeed, count, width }) {
    let state = randomSeed >>> 0
    const random = limit => { state = (Math.imul(state, 1664525) + 1013904223) >>> 0; return Math.floor(state / 2 ** 32 * limit) }
    const wrong = []
    async function one () {
      const kind = random(5), size = 1 + random(400000), piece = 1 + random(100000)
      if (kind === 0) {
        const got = await streams.echo({ peer, size, piece })
        if (got.size !== size || got.digest !== sha(pattern(0, size))) wrong.push(`echo of ${size}: ${got.size}`)
      } else if (kind === 1) {
        const got = await streams.sink({ peer, size, piece })
        if (got.size !== size || got.digest !== sha(pattern(0, size))) wrong.push(`sink of ${size}: ${got.size}`)
      } else if (kind === 2) {
        const stream = await open(peer, '/interop/source/1')
        await send(stream, Buffer.from(String(size)))
        await stream.close()
        // Read a little, and let go.
        for await (const _ of stream) break
        stream.abort(new Error('read enough'))
      } else if (kind === 3) {
        const stream = await open(peer, '/interop/sink/1')
        await send(stream, pattern(0, Math.min(size, 200000)))
        stream.abort(new Error('sent enough'))
      } else if ((await streams.reset({ peer })).error === undefined) wrong.push('a reset was not seen')
    }
    let left = count
    const lane = async () => { while (left-- > 0) await one() }
    await Promise.all(Array.from({ length: width }, lane))
    return { wrong }
  },
  async open () { return node.getConnections().flatMap(c => c.streams.map(s => s.protocol)).sort() },
  async ended () { return ended }
}

// ── the network ──

let networkId, voters
const lane = {}
const links = new Map()
const seen = { blocks: [], acks: 0, refused: [], bad: 0, ignored: [] }
const certificates = new Map()

function takeFrame (payload, from, via) {
  if (payload.length === 0) return
  try {
    const kind = payload[0], raw = payload.subarray(1)
    if (kind === formation.BLOCK_FRAME) {
      const block = formation.verifyBlock(raw, networkId)
      seen.blocks.push({ lane: hex(block.lane), seq: block.seq, kind: block.kind, verbs: block.ops.map(op => op[1]), hash: hex(block.hash), from, via })
    } else if (kind === formation.ACK_FRAME) {
      const ack = formation.verifyAck(raw, networkId, voters)
      seen.acks++
      for (const [laneId, seq, hash] of ack.heads) {
        if (!lane.own || Buffer.compare(laneId, lane.own.id)) continue
        const known = lane.hashes[seq - 1]
        if (!known || Buffer.compare(known, hash)) throw new Error('an ack names a block that we did not write')
        for (let below = 1; below <= seq; below++) {
          if (!certificates.has(below)) certificates.set(below, new Set())
          certificates.get(below).add(ack.voter)
        }
      }
    }
  } catch (error) { seen.bad++; seen.refused.push(error.message) }
}

// Voters open one to us; we only read it.
await node.handle(formation.LINK, async (stream, connection) => {
  const state = {}
  try { for await (const data of stream) for (const payload of formation.cutFrames(state, data.subarray())) takeFrame(payload, 'link', connection.remotePeer.toString()) } catch (error) { stream.abort(error) }
}, MANY)

// What is passed on is what a voter published and what verifies: the others' messages are ignored, a voter's bad one is rejected.
// The voters' peer ids hold their keys: 00 24 08 01 12 20, then 32 bytes.
const isVoter = peer => voters.some(key => peer.toMultihash?.().bytes && Buffer.compare(peer.toMultihash().bytes.subarray(-32), key) === 0)

function validate (via, message) {
  if (!isVoter(message.from)) {
    seen.ignored.push({ author: message.from.toString(), via: via.toString() })
    return TopicValidatorResult.Ignore
  }
  const before = seen.bad
  try {
    const topic = message.topic.split('/').pop()
    for (const payload of cbor.decode(message.data)) takeFrame(payload, `gossip ${topic}`, via.toString())
  } catch (error) { seen.bad++; seen.refused.push(error.message) }
  return seen.bad === before ? TopicValidatorResult.Accept : TopicValidatorResult.Reject
}

async function request (peer, protocol, payload) {
  const stream = await open(peer, protocol)
  await send(stream, formation.frame(payload))
  await stream.close()
  const parts = []
  for await (const data of stream) parts.push(Buffer.from(data.subarray()))
  const answer = Buffer.concat(parts)
  const [body] = formation.cutFrames({}, answer.subarray(1))
  if (answer[0] !== 0) throw new Error(cbor.decode(body).join(': '))
  return cbor.decode(body)
}

const network = {
  async dial ({ addr }) { const c = await node.dial(multiaddr(addr)); return { peer: c.remotePeer.toString(), encryption: c.encryption, multiplexer: c.multiplexer } },
  async close ({ peer }) { await node.hangUp(peerIdFromString(peer)); return {} },
  async connections () { return node.getConnections().map(c => ({ peer: c.remotePeer.toString(), direction: c.direction })) },
  async ping ({ peer }) { return { ms: await node.services.ping.ping(peerIdFromString(peer)) } },
  async identity ({ peer }) {
    const known = await node.peerStore.get(peerIdFromString(peer))
    return { protocols: known.protocols, agent: Buffer.from(known.metadata.get('AgentVersion') ?? []).toString(), addresses: known.addresses.map(a => a.multiaddr.toString()) }
  },
  async findPeer ({ peer }) {
    const found = await node.services.dht.findPeer(peerIdFromString(peer), { signal: AbortSignal.timeout(10000) })
    let addresses = []
    for await (const event of found) if (event.name === 'FINAL_PEER') addresses = event.peer.multiaddrs.map(String)
    return { addresses }
  },
  async closest ({ key }) {
    const peers = new Set()
    for await (const event of node.services.dht.getClosestPeers(unhex(key), { signal: AbortSignal.timeout(10000) })) if (event.name === 'FINAL_PEER') peers.add(event.peer.id.toString())
    return { peers: [...peers] }
  },
  // The network's id and its voters' keys, in the order of the manifest.
  async trust (said) { networkId = unhex(said.networkId); voters = said.voters.map(unhex); return {} },
  async follow ({ topics }) {
    for (const topic of topics) {
      const name = `formation/${hex(networkId).slice(0, 16)}/${topic}`
      node.services.pubsub.topicValidators.set(name, validate)
      node.services.pubsub.subscribe(name)
    }
    return {}
  },
  async gossip () { return node.services.pubsub.getTopics().map(topic => ({ topic, subscribers: node.services.pubsub.getSubscribers(topic).map(String), mesh: node.services.pubsub.getMeshPeers(topic) })) },
  async seen () { return seen },
  async link ({ peer }) {
    const stream = await open(peer, formation.LINK)
    const timer = setInterval(() => stream.send(formation.frame(Buffer.alloc(0))), KEEP_ALIVE_MS)
    const link = { stream, isOpen: true }
    links.set(peer, link)
    const close = () => { link.isOpen = false; clearInterval(timer) }
    ;(async () => { for await (const _ of stream); })().then(close, close)
    return {}
  },
  async links () { return Object.fromEntries([...links].map(([peer, link]) => [peer, link.isOpen])) },
  async publish ({ kind, ops }) {
    if (!lane.own) { lane.own = new formation.Lane(new formation.Key(seed), networkId); lane.hashes = [] }
    const raw = lane.own.append(kind, ops)
    lane.hashes.push(lane.own.head)
    const payload = formation.frame(Buffer.concat([Buffer.of(formation.BLOCK_FRAME), raw]))
    for (const { stream, isOpen } of links.values()) if (isOpen) await send(stream, payload)
    return { lane: hex(lane.own.id), seq: lane.own.seq, hash: hex(lane.own.head) }
  },
  async advertise ({ name }) {
    const body = new Map(Object.entries({ name, addresses: node.getMultiaddrs().map(String), public_address: '', hypervisor: 'none', version: 'js',
      capacity: new Map([['vcpus', 0], ['memory_mib', 0], ['disk_gib', 0]]) }))
    return await network.publish({ kind: 'node', ops: [['C', 'node.advertised', node.peerId.toString(), body, null, null]] })
  },
  async putValue ({ accountSeed, key, value }) {
    const account = new formation.Key(unhex(accountSeed))
    const id = formation.accountId(account.public), objectId = `${id}/${key}`
    const intent = formation.makeIntent(account, networkId, 'value.put', objectId, new Map([['value', new Uint8Array(Buffer.from(value))]]))
    return { account: id, ...await network.publish({ kind: 'value', ops: [['C', 'value.put', objectId, null, null, intent]] }) }
  },
  // The same, handed to a node that may write.
  async wish ({ peer, accountSeed, key, value }) {
    const account = new formation.Key(unhex(accountSeed))
    const objectId = `${formation.accountId(account.public)}/${key}`
    const intent = formation.makeIntent(account, networkId, 'value.put', objectId, new Map([['value', new Uint8Array(Buffer.from(value))]]))
    const [object, , laneId, seq] = await request(peer, formation.INTENT, intent)
    return { object, lane: laneId, seq }
  },
  // How many different voters' acks of our block we have verified.
  async signers ({ seq }) { return { count: certificates.get(seq)?.size ?? 0 } },
  async syncHello ({ peer }) { const [kind, prints, epoch, view, height] = await request(peer, formation.SYNC, cbor.encode(['hello', new Uint8Array(32)])); return { kind, size: prints.length, epoch, view, height } },
  async pull ({ peer, lane: laneId, last }) {
    const [, blocks, acks] = await request(peer, formation.SYNC, cbor.encode(['pull', [[unhex(laneId), 1, last, 0, false]]]))
    return { blocks: blocks.map(raw => { const b = formation.verifyBlock(raw, networkId); return { seq: b.seq, prev: hex(b.prev), hash: hex(b.hash) } }), signers: new Set(acks.map(raw => formation.verifyAck(raw, networkId, voters).voter)).size }
  },
  // An op file as it is, and with one bit of it turned in each of so many places.
  async opFile ({ base64, flipCount }) {
    const data = new Uint8Array(Buffer.from(base64, 'base64')), said = formation.verifyOpFile(data, networkId)
    const believed = []
    for (let i = 0; i < flipCount; i++) {
      const at = Math.floor(i * data.length / flipCount), turned = data.slice()
      turned[at] ^= 1 << (i % 8)
      try { formation.verifyOpFile(turned, networkId); believed.push(at) } catch { /* as it should */ }
    }
    return { ...said, believed, size: data.length }
  },
  // Rubbish of all kinds.
  async rubbishFrames ({ peer, what }) {
    const { stream } = links.get(peer)
    const block = new formation.Lane(new formation.Key(seed), networkId).append('node', [['C', 'node.advertised', 'x', new Map(), null, null]])
    const forged = block.slice()
    forged[forged.length - 1] ^= 1
    const kinds = { unknown: [99, 1, 2, 3], notCbor: [1, 255, 255, 255], forged: [1, ...forged], badAck: [2, ...forged], otherNetwork: [1, ...formation.sign(new formation.Key(seed), 'block', new Uint8Array(32), formation.parseSigned(block).payload)] }
    await send(stream, formation.frame(Uint8Array.from(kinds[what])))
    return {}
  },
  async oversized ({ peer }) { await send(links.get(peer).stream, new Uint8Array([0xff, 0xff, 0xff, 0xff, 1])); return {} },
  async badRequest ({ peer }) { return await request(peer, formation.SYNC, Uint8Array.of(1, 2, 3)) },
  async gossipRubbish ({ topic, count }) {
    const name = `formation/${hex(networkId).slice(0, 16)}/${topic}`
    const recipients = new Set()
    for (let i = 0; i < count; i++) for (const peer of (await node.services.pubsub.publish(name, new Uint8Array(crypto.randomBytes(200)))).recipients) recipients.add(peer.toString())
    return { recipients: [...recipients] }
  },
  async rawGossip ({ peer }) { const stream = await open(peer, '/meshsub/1.1.0'); await send(stream, Uint8Array.of(4, 0xff, 0xff, 0xff, 0xff)); await sleep(200); return {} },
  // schemas/ against this program: every golden value has the one encoding, what is signed verifies, crafted signatures do not.
  async golden ({ values, edge }) {
    const golden = JSON.parse(fs.readFileSync(values)), wrong = []
    let blocks = 0
    const id = formation.sha256(unhex(golden.manifest.cbor))
    for (const [name, { rule, cbor: digits }] of Object.entries(golden)) {
      const raw = unhex(digits)
      if (rule === 'cose_sign1') { formation.parseSigned(raw) } else if (hex(cbor.encode(cbor.decode(raw))) !== digits) wrong.push(name)
      if (name === 'block signed') { formation.verifyBlock(raw, id); blocks++ }
    }
    for (const e of JSON.parse(fs.readFileSync(edge))) if (formation.verifyEd25519(unhex(e.public_key), unhex(e.message), unhex(e.signature)) !== e.holds) wrong.push(e.name)
    return { wrong, blocks, count: Object.keys(golden).length }
  },
  async stop () { setTimeout(() => process.exit(0), 1000).unref(); await node.stop(); setTimeout(() => process.exit(0), 10); return {} }
}

const commands = { ...streams, ...network }
out({ ready: node.peerId.toString(), addresses: node.getMultiaddrs().map(String) })
// Whoever started us is gone: so are we.
const lines = readline.createInterface({ input: process.stdin })
lines.on('close', () => process.exit(0))
for await (const line of lines) {
  const { id, command, ...options } = JSON.parse(line)
  commands[command](options).then(ok => out({ id, ok }), error => out({ id, error: `${error.name}: ${error.message}` }))
}
