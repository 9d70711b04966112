// Taking part in a network: finding peers, following what voters say, writing a lane. docs/interop.md says why so.

import fs from 'node:fs'
import { TopicValidatorResult } from '@libp2p/gossipsub'
import { multiaddr } from '@multiformats/multiaddr'
import { peerIdFromString } from '@libp2p/peer-id'
import * as cbor from './cbor.mjs'
import * as formation from './formation.mjs'
import { MANY, node, open, seed, send } from './node.mjs'

const { hex, unhex } = formation
const KEEP_ALIVE_MS = 2500

// What a manifest says: the network's id, and its voters' keys in their order.
export const trusted = { networkId: null, voters: [] }
// Streams that we write to, by peer.
export const links = new Map()
// Our lane, the hashes of its blocks, and which voters acknowledged each.
const lane = { own: null, hashes: [], signers: [] }
const seen = { blocks: [], acks: 0, bad: 0, refused: [], ignored: [] }

export const topicName = topic => `formation/${hex(trusted.networkId).slice(0, 16)}/${topic}`

// ── what others say ──

function takeFrame (payload, from, via) {
  if (payload.length === 0) return
  try {
    const kind = payload[0], raw = payload.subarray(1)
    if (kind === formation.BLOCK_FRAME) takeBlock(raw, from, via)
    else if (kind === formation.ACK_FRAME) takeAck(raw)
  } catch (error) { note(error) }
}

function note (error) {
  seen.bad++
  seen.refused.push(error.message)
}

function takeBlock (raw, from, via) {
  const block = formation.verifyBlock(raw, trusted.networkId)
  const verbs = block.ops.map(op => op[1])
  seen.blocks.push({ lane: hex(block.lane), seq: block.seq, kind: block.kind, verbs, hash: hex(block.hash), from, via })
}

function takeAck (raw) {
  const ack = formation.verifyAck(raw, trusted.networkId, trusted.voters)
  seen.acks++
  for (const [laneId, seq, hash] of ack.heads) {
    if (lane.own === null || Buffer.compare(laneId, lane.own.id)) continue
    const known = lane.hashes[seq - 1]
    if (!known || Buffer.compare(known, hash)) throw new Error('an ack names a block that we did not write')
    // It acknowledges all blocks before it, too.
    for (const signers of lane.signers.slice(0, seq)) signers.add(ack.voter)
  }
}

// Voters open one to us; we only read it.
await node.handle(formation.LINK, async (stream, connection) => {
  const state = {}, via = connection.remotePeer.toString()
  try {
    for await (const data of stream) {
      for (const payload of formation.cutFrames(state, data.subarray())) takeFrame(payload, 'link', via)
    }
  } catch (error) { stream.abort(error) }
}, MANY)

// A voter's peer id holds its key: 00 24 08 01 12 20, then 32 bytes.
const isVoter = peer => trusted.voters.some(key => Buffer.compare(peer.toMultihash().bytes.subarray(-32), key) === 0)

// Passed on is what a voter published and what verifies: others' messages are ignored, a voter's bad one is rejected.
function validate (via, message) {
  if (!isVoter(message.from)) {
    seen.ignored.push({ author: message.from.toString(), via: via.toString() })
    return TopicValidatorResult.Ignore
  }
  const before = seen.bad
  const from = `gossip ${message.topic.split('/').pop()}`
  try {
    for (const payload of cbor.decode(message.data)) takeFrame(payload, from, via.toString())
  } catch (error) { note(error) }
  return seen.bad === before ? TopicValidatorResult.Accept : TopicValidatorResult.Reject
}

// ── what we ask and say ──

export async function request (peer, protocol, payload) {
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

async function publish (kind, op) {
  lane.own ??= new formation.Lane(new formation.Key(seed), trusted.networkId)
  const raw = lane.own.append(kind, [op])
  lane.hashes.push(lane.own.head)
  lane.signers.push(new Set())
  const payload = formation.frame(Buffer.concat([Buffer.of(formation.BLOCK_FRAME), raw]))
  for (const { stream, isOpen } of links.values()) if (isOpen) await send(stream, payload)
  return { lane: hex(lane.own.id), seq: lane.own.seq, hash: hex(lane.own.head) }
}

// An account's signed wish to have a value, and what it is about.
function valueIntent (accountSeed, key, value) {
  const account = new formation.Key(unhex(accountSeed))
  const objectId = `${formation.accountId(account.public)}/${key}`
  const body = new Map([['value', new Uint8Array(Buffer.from(value))]])
  return [objectId, formation.makeIntent(account, trusted.networkId, 'value.put', objectId, body)]
}

export const commands = {
  async dial ({ addr }) {
    const { remotePeer, encryption, multiplexer } = await node.dial(multiaddr(addr))
    return { peer: remotePeer.toString(), encryption, multiplexer }
  },

  async close ({ peer }) {
    await node.hangUp(peerIdFromString(peer))
    return {}
  },

  async connections () {
    return node.getConnections().map(c => ({ peer: c.remotePeer.toString(), direction: c.direction }))
  },

  async ping ({ peer }) { return { ms: await node.services.ping.ping(peerIdFromString(peer)) } },

  async identity ({ peer }) { return { protocols: (await node.peerStore.get(peerIdFromString(peer))).protocols } },

  async findPeer ({ peer }) {
    let addresses = []
    for await (const event of node.services.dht.findPeer(peerIdFromString(peer), { signal: AbortSignal.timeout(10000) })) {
      if (event.name === 'FINAL_PEER') addresses = event.peer.multiaddrs.map(String)
    }
    return { addresses }
  },

  async closest ({ key }) {
    const peers = new Set()
    for await (const event of node.services.dht.getClosestPeers(unhex(key), { signal: AbortSignal.timeout(10000) })) {
      if (event.name === 'FINAL_PEER') peers.add(event.peer.id.toString())
    }
    return { peers: [...peers] }
  },

  async trust ({ networkId, voters }) {
    trusted.networkId = unhex(networkId)
    trusted.voters = voters.map(unhex)
    return {}
  },

  async follow ({ topics }) {
    for (const name of topics.map(topicName)) {
      node.services.pubsub.topicValidators.set(name, validate)
      node.services.pubsub.subscribe(name)
    }
    return {}
  },

  async gossip () {
    const { pubsub } = node.services
    return pubsub.getTopics().map(topic => ({ topic, subscribers: pubsub.getSubscribers(topic).map(String) }))
  },

  async seen () { return seen },

  async link ({ peer }) {
    const stream = await open(peer, formation.LINK)
    const timer = setInterval(() => stream.send(formation.frame(new Uint8Array(0))), KEEP_ALIVE_MS)
    const link = { stream, isOpen: true }
    links.set(peer, link)
    const close = () => { link.isOpen = false; clearInterval(timer) }
    // Nothing comes on it but its end.
    ;(async () => { for await (const _ of stream); })().then(close, close)
    return {}
  },

  async links () { return Object.fromEntries([...links].map(([peer, link]) => [peer, link.isOpen])) },

  async advertise ({ name }) {
    const capacity = new Map([['vcpus', 0], ['memory_mib', 0], ['disk_gib', 0]])
    const addresses = node.getMultiaddrs().map(String)
    const fields = { name, addresses, public_address: '', hypervisor: 'none', version: 'js', capacity, cordon: 'open', labels: new Map() }
    const body = new Map(Object.entries(fields))
    return await publish('node', ['C', 'node.advertised', node.peerId.toString(), body, null, null])
  },

  async putValue ({ accountSeed, key, value }) {
    const [objectId, intent] = valueIntent(accountSeed, key, value)
    const block = await publish('value', ['C', 'value.put', objectId, null, null, intent])
    return { account: objectId.split('/')[0], ...block }
  },

  // The same, handed to a node that may write.
  async wish ({ peer, accountSeed, key, value }) {
    const [, intent] = valueIntent(accountSeed, key, value)
    const [object, , laneId, seq] = await request(peer, formation.INTENT, intent)
    return { object, lane: laneId, seq }
  },

  // How many different voters' acks of our block we have verified.
  async signers ({ seq }) { return { count: lane.signers[seq - 1].size } },

  async syncHello ({ peer }) {
    const hello = cbor.encode(['hello', new Uint8Array(32)])
    const [kind, fingerprints, epoch, view, height] = await request(peer, formation.SYNC, hello)
    return { kind, size: fingerprints.length, epoch, view, height }
  },

  async pull ({ peer, lane: laneId, last }) {
    const pull = cbor.encode(['pull', [[unhex(laneId), 1, last, 0, false]]])
    const [, blocks] = await request(peer, formation.SYNC, pull)
    const verified = blocks.map(raw => formation.verifyBlock(raw, trusted.networkId))
    return { blocks: verified.map(block => ({ seq: block.seq, prev: hex(block.prev), hash: hex(block.hash) })) }
  },

  // An op file as it is, and with one bit of it turned in each of so many places.
  async opFile ({ base64, flipCount }) {
    const data = new Uint8Array(Buffer.from(base64, 'base64'))
    const said = formation.verifyOpFile(data, trusted.networkId)
    const believed = []
    for (let i = 0; i < flipCount; i++) {
      const at = Math.floor(i * data.length / flipCount), turned = data.slice()
      turned[at] ^= 1 << (i % 8)
      try {
        formation.verifyOpFile(turned, trusted.networkId)
        believed.push(at)
      } catch { /* as it should */ }
    }
    return { ...said, believed }
  },

  // schemas/ against this program: every golden value has the one encoding, signed ones verify, crafted signatures do not.
  async golden ({ values, edge }) {
    const golden = JSON.parse(fs.readFileSync(values)), wrong = []
    for (const [name, { rule, cbor: digits }] of Object.entries(golden)) {
      const raw = unhex(digits)
      if (rule === 'cose_sign1') formation.parseSigned(raw)
      else if (hex(cbor.encode(cbor.decode(raw))) !== digits) wrong.push(name)
    }
    const manifest = unhex(golden.manifest.cbor), id = formation.sha256(manifest)
    const voters = cbor.decode(manifest)[3].map(founder => founder[1])
    formation.verifyBlock(unhex(golden['block signed'].cbor), id)
    formation.verifyAck(unhex(golden['ack signed'].cbor), id, voters)
    for (const { name, public_key: key, message, signature, holds } of JSON.parse(fs.readFileSync(edge))) {
      if (formation.verifyEd25519(unhex(key), unhex(message), unhex(signature)) !== holds) wrong.push(name)
    }
    return { wrong, count: Object.keys(golden).length }
  }
}
