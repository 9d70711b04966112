// One process of js-libp2p for the figures of the network: p2p_peer.py in another language, with the same commands.
// Both speak the same protocols, so that streams are measured between the two as well.

import readline from 'node:readline'
import {
  createLibp2p, gossipsub, generateKeyPair, generateKeyPairFromSeed, identify, kadDHT, multiaddr, noise, passthroughMapper,
  peerIdFromString, ping, tcp, yamux
} from '../../tests/interop/libp2p.mjs'

const KAD = '/formation/kad/1'
const TOPIC = 'bench', ECHO = '/bench/echo/1', SINK = '/bench/sink/1', LINK = '/bench/link/1'
// As p2p_peer.py: run, index, when it was due.
const HEADER_SIZE_BYTES = 16
const TICK_NS = 2_000_000
// As formation/p2p/link.py: one send of what waits.
const BATCH_SIZE_BYTES = 256 * 1024
const RETRY_MS = 100
const MANY = { maxInboundStreams: 4096, maxOutboundStreams: 4096 }

const options = JSON.parse(process.argv[2])
const unhex = digits => new Uint8Array(Buffer.from(digits, 'hex'))
const sleep = ms => new Promise(resolve => setTimeout(resolve, ms))
const turn = () => new Promise(resolve => setImmediate(resolve))
// CLOCK_MONOTONIC, as time.monotonic_ns() in Python: one clock for all processes of a machine.
const nowNs = () => Number(process.hrtime.bigint())

const make = privateKey => createLibp2p({
  privateKey,
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  // By itself it takes 5 connections a second from one host, and dials no loopback address.
  connectionManager: { inboundConnectionThreshold: 1e6, maxIncomingPendingConnections: 1e6, maxConnections: 1000 },
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify(),
    ping: ping({ maxInboundStreams: 8, maxOutboundStreams: 8 }),
    pubsub: gossipsub({
      globalSignaturePolicy: 'StrictSign',
      allowPublishToZeroTopicPeers: true,
      emitSelf: false,
      // The mesh that formation/p2p/libp2p_gossip.py has; flooding would be another protocol.
      D: 8, Dlo: 6, Dhi: 1024, floodPublish: false,
      // Peers of one address are no attack here.
      scoreParams: { IPColocationFactorWeight: 0 }
    }),
    ...(options.discovers
      ? { dht: kadDHT({ protocol: KAD, clientMode: false, peerInfoMapper: passthroughMapper, allowQueryWithZeroPeers: true }) }
      : {})
  }
})

const node = await make(await generateKeyPairFromSeed('Ed25519', unhex(options.seed)))
const open = (peer, protocol) => node.dialProtocol(peerIdFromString(peer), protocol, MANY)
async function send (stream, data) { if (!stream.send(data)) await stream.onDrain() }

// ── messages ──

const received = { run: -1, latenciesUs: [], lastNs: 0 }

function take (data) {
  const view = new DataView(data.buffer, data.byteOffset, HEADER_SIZE_BYTES)
  if (view.getUint32(0) !== received.run) return
  const at = nowNs()
  received.lastNs = at
  received.latenciesUs.push(Math.round((at - Number(view.getBigUint64(8))) / 1000))
}

node.services.pubsub.addEventListener('message', event => { if (event.detail.topic === TOPIC) take(event.detail.data) })

// ── direct streams, one for each direction, as links are ──

const links = new Map()

async function pump (link) {
  while (link.queue.length > 0) {
    const parts = []
    for (let size = 0; link.queue.length > 0 && size < BATCH_SIZE_BYTES; size += parts.at(-1).length) parts.push(link.queue.shift())
    await send(link.stream, parts.length === 1 ? parts[0] : Buffer.concat(parts))
  }
  link.isBusy = false
}

function sendFrames (payload) {
  const frame = Buffer.allocUnsafe(4 + payload.length)
  frame.writeUInt32BE(payload.length)
  frame.set(payload, 4)
  for (const link of links.values()) {
    link.queue.push(frame)
    if (link.isBusy) continue
    link.isBusy = true
    setImmediate(() => pump(link).catch(error => { process.stderr.write(`link: ${error}\n`) }))
  }
}

await node.handle(LINK, async stream => {
  let rest = Buffer.alloc(0)
  for await (const piece of stream) {
    const data = piece.subarray()
    rest = rest.length === 0 ? Buffer.from(data.buffer, data.byteOffset, data.length) : Buffer.concat([rest, data])
    let start = 0
    while (rest.length - start >= 4 && rest.length - start - 4 >= rest.readUInt32BE(start)) {
      const stop = start + 4 + rest.readUInt32BE(start)
      take(rest.subarray(start + 4, stop))
      start = stop
    }
    rest = rest.subarray(start)
  }
}, MANY)

// ── streams ──

await node.handle(ECHO, async stream => {
  for await (const data of stream) await send(stream, data)
  await stream.close()
}, MANY)

await node.handle(SINK, async stream => {
  let size = 0
  for await (const data of stream) size += data.byteLength
  await send(stream, Buffer.from(String(size)))
  await stream.close()
}, MANY)

async function readAll (stream) {
  const parts = []
  for await (const data of stream) parts.push(Buffer.from(data.subarray()))
  return Buffer.concat(parts)
}

// ── commands ──

const farm = []

const commands = {
  async connect ({ peer, addresses }) {
    await node.dial(addresses.map(address => multiaddr(`${address.split('/p2p/')[0]}/p2p/${peer}`)))
    return {}
  },

  async connected () { return new Set(node.getConnections().map(connection => connection.remotePeer.toString())).size },

  async subscribe () { node.services.pubsub.subscribe(TOPIC); return {} },

  async mesh () { return node.services.pubsub.getMeshPeers(TOPIC).length },

  async link ({ peers }) {
    for (const peer of peers) links.set(peer, { stream: await open(peer, LINK), queue: [], isBusy: false })
    return {}
  },

  async links () { return links.size },

  async begin ({ run }) { Object.assign(received, { run, latenciesUs: [], lastNs: 0 }); return {} },

  async publish ({ run, way, count, size, first_ns: firstNs, interval_ns: intervalNs, late_ns_max: lateNsMax }) {
    let lateNs = 0, index = 0
    for (; index < count; index++) {
      const dueNs = firstNs + index * intervalNs
      const waitMs = (dueNs - nowNs()) / 1e6
      await (waitMs > 0 ? sleep(waitMs) : turn())
      const now = nowNs(), payload = Buffer.alloc(size)
      lateNs = Math.max(lateNs, now - dueNs)
      if (lateNs > lateNsMax) break
      payload.writeUInt32BE(run, 0)
      payload.writeUInt32BE(index, 4)
      payload.writeBigUInt64BE(BigInt(now - dueNs > TICK_NS ? dueNs : now), 8)
      if (way === 'direct') sendFrames(payload)
      else await node.services.pubsub.publish(TOPIC, payload)
    }
    return { count: index, late_ms: lateNs / 1e6 }
  },

  async received () { return received.latenciesUs.length },

  async collect () { return { latencies_us: received.latenciesUs, last_ns: received.lastNs } },

  async pour ({ peer, size, piece }) {
    const stream = await open(peer, SINK), data = new Uint8Array(piece), begun = nowNs()
    for (let sent = 0; sent < size; sent += piece) await send(stream, data)
    await stream.close()
    const count = Number((await readAll(stream)).toString())
    return { size: count, seconds: (nowNs() - begun) / 1e9 }
  },

  async round_trips ({ peer, count, size }) {
    const stream = await open(peer, ECHO), pieces = stream[Symbol.asyncIterator](), latenciesUs = []
    for (let i = 0; i < count; i++) {
      const begun = nowNs()
      await send(stream, new Uint8Array(size))
      for (let got = 0; got < size;) {
        const { done, value } = await pieces.next()
        if (done) throw new Error(`the stream ended after ${i} answers`)
        got += value.byteLength
      }
      latenciesUs.push(Math.round((nowNs() - begun) / 1000))
    }
    await stream.close()
    return latenciesUs
  },

  async requests ({ peer, count, size }) {
    const latenciesUs = []
    for (let i = 0; i < count; i++) {
      const begun = nowNs(), stream = await open(peer, ECHO)
      await send(stream, new Uint8Array(size))
      await stream.close()
      if ((await readAll(stream)).length !== size) throw new Error('a short answer')
      latenciesUs.push(Math.round((nowNs() - begun) / 1000))
    }
    return latenciesUs
  },

  // Connect to each of these ids, knowing where one of them is.
  async find ({ bootstrap, peers, timeout_s: timeoutS }) {
    const begun = nowNs(), end = begun + timeoutS * 1e9
    const since = () => (nowNs() - begun) / 1e9
    while (bootstrap && nowNs() < end) {
      try { await commands.connect(bootstrap); break } catch { await sleep(RETRY_MS) }
    }
    const atS = {}
    async function one (peer) {
      while (nowNs() < end) {
        try {
          await node.dial(peerIdFromString(peer), { signal: AbortSignal.timeout(5000) })
          atS[peer] = since()
          return
        } catch { await sleep(RETRY_MS) }
      }
    }
    await Promise.all(peers.map(one))
    return atS
  },

  // Further peers in this process, each connected to that one.
  async farm ({ count, peer, addresses }) {
    for (let i = 0; i < count; i++) {
      const one = await make(await generateKeyPair('Ed25519'))
      one.services.pubsub.subscribe(TOPIC)
      await one.dial(addresses.map(address => multiaddr(`${address.split('/p2p/')[0]}/p2p/${peer}`)))
      farm.push(one)
    }
    return {}
  }
}

const out = value => process.stdout.write(JSON.stringify(value) + '\n')
out({ ready: node.peerId.toString(), addresses: node.getMultiaddrs().map(String) })
const lines = readline.createInterface({ input: process.stdin })
// Whoever started us is gone: so are we.
lines.on('close', () => process.exit(0))
for await (const line of lines) {
  const { id, command, ...rest } = JSON.parse(line)
  commands[command](rest).then(ok => out({ id, ok }), error => out({ id, error: `${error.name}: ${error.message}` }))
}
