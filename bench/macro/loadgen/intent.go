package main

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// An account as the harness hands it over.
type account struct {
	ID   string `json:"account_id"`
	Seed string `json:"seed"`

	key       ed25519.PrivateKey
	publicKey []byte
}

func readAccounts(path string) ([]*account, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var accounts []*account
	if err := json.Unmarshal(raw, &accounts); err != nil {
		return nil, fmt.Errorf("%s: %v", path, err)
	}
	for _, a := range accounts {
		seed, err := hex.DecodeString(a.Seed)
		if err != nil || len(seed) != ed25519.SeedSize {
			return nil, fmt.Errorf("%s: a seed is not 32 bytes in hex", path)
		}
		a.key = ed25519.NewKeyFromSeed(seed)
		a.publicKey = a.key.Public().(ed25519.PublicKey)
	}
	if len(accounts) == 0 {
		return nil, fmt.Errorf("%s: no account", path)
	}
	return accounts, nil
}

const lifetimeMs = 5 * 60 * 1000

// signer makes intents (core/intent.py): the CBOR of Intent inside a COSE_Sign1 (RFC 9052) in context "intent".
type signer struct {
	aad     []byte
	nonce   [16]byte
	count   uint64
	payload []byte
	message []byte
}

var coseProtected = []byte{0xa1, 0x01, 0x27} // {1: -8}, EdDSA

func newSigner(networkID []byte) (*signer, error) {
	s := &signer{aad: appendBytes(appendText(appendArray(nil, 2), "intent"), networkID)}
	_, err := rand.Read(s.nonce[:])
	return s, err
}

// appendIntent appends the signed intent's bytes, without a string head, to `b`.
func (s *signer) appendIntent(b []byte, a *account, verb, objectID string, body []byte) []byte {
	s.count++
	binary.BigEndian.PutUint64(s.nonce[8:], s.count)
	now := uint64(time.Now().UnixMilli())
	p := appendBytes(appendArray(s.payload[:0], 8), a.publicKey)
	p = appendText(p, verb)
	p = appendText(p, objectID)
	p = appendBytes(p, body)
	p = appendBytes(p, s.nonce[:])
	p = appendUint(p, now)
	p = appendUint(p, now+lifetimeMs)
	p = appendBytes(p, a.publicKey)
	s.payload = p
	m := appendText(appendArray(s.message[:0], 4), "Signature1")
	m = appendBytes(m, coseProtected)
	m = appendBytes(m, s.aad)
	m = appendBytes(m, p)
	s.message = m
	signature := ed25519.Sign(a.key, m)
	b = append(b, 0xd2) // tag 18
	b = appendBytes(appendArray(b, 4), coseProtected)
	b = appendMap(b, 0)
	b = appendBytes(b, p)
	return appendBytes(b, signature)
}
