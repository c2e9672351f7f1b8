"""Signing in with the loopback Hub: OpenID Connect as the real one speaks it, for whoever `hub.visitor` is. Mixed into
its handler. Nobody is asked for consent: the authorisation page sends the browser straight back."""

import secrets
import time
from functools import cache
from urllib.parse import parse_qs, urlencode, urlsplit


KEY = "loopback"


@cache
def signing_key():
    from joserfc.jwk import RSAKey

    return RSAKey.generate_key(2048, {"kid": KEY, "alg": "RS256", "use": "sig"})


class SignIn:
    """`hub.codes` maps what was handed to a browser to (token, nonce); a code works once."""

    def _openid(self) -> None:
        url = self.hub.url
        self._json({
            "issuer": url, "authorization_endpoint": f"{url}/oauth/authorize", "token_endpoint": f"{url}/oauth/token",
            "userinfo_endpoint": f"{url}/oauth/userinfo", "jwks_uri": f"{url}/oauth/jwks",
            "id_token_signing_alg_values_supported": ["RS256"], "response_types_supported": ["code"],
        })  # fmt: skip

    def _jwks(self) -> None:
        self._json({"keys": [signing_key().as_dict(private=False)]})

    def _authorize(self) -> None:
        asked = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        self.hub.scopes = asked["scope"]
        code = secrets.token_urlsafe(8)
        self.hub.codes[code] = (self.hub.visitor, asked.get("nonce", ""), asked["client_id"])
        joined = "&" if "?" in asked["redirect_uri"] else "?"
        self.send_response(302)
        self.send_header(
            "Location", asked["redirect_uri"] + joined + urlencode({"code": code, "state": asked["state"]})
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _token(self, *, body: bytes, query: object) -> None:
        from joserfc import jwt

        code = parse_qs(body.decode()).get("code", [""])[0]
        if code not in self.hub.codes:
            return self._json({"error": "invalid_grant"}, status=400)
        token, nonce, client = self.hub.codes.pop(code)
        name = self.hub.users[token]
        claims = {
            "iss": self.hub.url, "sub": name, "aud": client, "exp": int(time.time()) + 3600, "iat": int(time.time()),
            "nonce": nonce, "name": name, "preferred_username": name, "profile": f"{self.hub.url}/{name}",
            "picture": f"{self.hub.url}/{name}.png",
        }  # fmt: skip
        signed = jwt.encode({"alg": "RS256", "kid": KEY}, claims, signing_key())
        answer = {"access_token": token, "token_type": "bearer", "expires_in": 3600, "id_token": signed}
        return self._json({**answer, "scope": self.hub.scopes})

    def _userinfo(self) -> None:
        self._json({"sub": self.user() or "", "preferred_username": self.user() or ""})
