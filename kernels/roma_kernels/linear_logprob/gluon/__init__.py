"""Products with the head for sm_90 by warps that specialise, in Gluon: plan "gluon"."""
